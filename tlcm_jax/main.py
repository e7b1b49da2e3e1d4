"""Distils a teacher: `python -m tlcm_jax.main --config configs/emoji.py --workdir runs/emoji`.

The same command resumes a run that was stopped. Exit codes: 0 finished; 75 (EX_TEMPFAIL) asked to
stop by SIGTERM, to be resumed; 1 an error, which is one line.
"""

import contextlib
import functools
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from tlcm_jax.training import compilation

# Keys that a recipe leaves at their defaults can be set too; `settings.read` refuses unknown ones.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The recipe, such as configs/emoji.py; --config.KEY=VALUE changes a key of it.",
    lock_config=False,
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, samples, report.")
_PROFILE = flags.DEFINE_string(
    "profile_steps", "", "Trace these steps of the run, FIRST:LAST, for XProf or TensorBoard."
)
_JOIN = flags.DEFINE_integer(
    "join_seconds", 60, "How long the processes of a run of several wait for one another."
)
_DEBUG = flags.DEFINE_integer(
    "debug_step", 0, "Instead of training, repeat this update operation by operation, for its NaN."
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw progress bars.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    compilation.CACHE,
    "Where compiled programs are kept from run to run; empty keeps none.",
)


def main(argv: list[str]) -> None:
    """Reads the flags, runs the recipe; what a user can cause is an error of one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from tlcm_jax.training import distributed
    from tlcm_jax.training.preemption import EXIT_CODE, Preemption

    several = False
    try:
        # Before anything touches a backend.
        several = distributed.initialize(join_seconds=_JOIN.value)
        compilation.use_cache(_CACHE.value)
        config = _CONFIG.value.to_dict()
        with Preemption(at_once=True) as preemption:
            completed = run(
                config,
                _WORKDIR.value,
                progress=_PROGRESS.value,
                profile_steps=_PROFILE.value,
                preemption=preemption,
                debug_step=_DEBUG.value,
            )
    except (ValueError, FileNotFoundError, OSError, RuntimeError) as error:
        if logging.level_debug():
            raise
        if several:
            told = distributed.describe_failure(error)
            distributed.end_now(f"error: {told}{_how_to_repeat(error)}")
        sys.exit(f"error: {error}{_how_to_repeat(error)}")
    if not completed and not _DEBUG.value:
        sys.exit(EXIT_CODE)


def run(
    config: dict[str, Any],
    workdir: str | Path,
    *,
    progress: bool = True,
    profile_steps: str = "",
    preemption: Any = None,
    debug_step: int = 0,
) -> bool:
    """Trains a recipe's student, then evaluates, reports and exports it.

    Args:
      config: the recipe as plain nested values.
      workdir: the run's folder.
      progress: whether to draw progress bars.
      profile_steps: `FIRST:LAST`, the steps of a profiler's trace; empty traces none.
      preemption: already listening (`training.preemption`).
      debug_step: the update to repeat instead of training; 0 trains.

    Returns:
      Whether it is finished; otherwise the same command resumes it.

    Raises:
      ValueError, FileNotFoundError: bad input; the message says what to change.
      RuntimeError: updates are not finite any more, or another run holds the workdir.
      OSError: the disk is full.
    """
    started = time.monotonic()
    import jax

    from tlcm_jax.config import outputs
    from tlcm_jax.config.optional_terms import without_missing
    from tlcm_jax.config.run import train
    from tlcm_jax.config.schema import read
    from tlcm_jax.training import distributed
    from tlcm_jax.training.lock import WorkdirLock
    from tlcm_jax.training.profile import parse_steps

    if "://" in str(workdir):
        raise ValueError(
            f"--workdir {workdir} is no folder: mount the bucket (gcsfuse, as "
            "launch/tpu_slice.sh does) and give the folder it is mounted on"
        )
    config, left_out = without_missing(config)
    for line in left_out:
        logging.warning("%s", line)
    wanted = outputs.load_outputs(settings := read(config), Path(workdir))
    steps = parse_steps(profile_steps)
    with contextlib.ExitStack() as stack:
        lock = WorkdirLock(workdir)
        distributed.lead_first(lambda: stack.enter_context(lock))
        result = train(
            config,
            workdir,
            progress=progress,
            profile_steps=steps,
            make_hooks=functools.partial(
                outputs.preview_hooks,
                workdir=Path(workdir),
                scorers=wanted.scorers if wanted else (),
            ),
            lock=lock,
            preemption=preemption,
            debug_step=debug_step,
        )
        if debug_step:
            return False
        if not result.completed:
            logging.warning("stopped on request; the same command resumes this run")
            return False
        result = outputs.gather_to_local(result, settings)
        if jax.process_index() == 0:
            outputs.write_outputs(
                result, settings, wanted, Path(workdir), config, started=started, progress=progress
            )
        # A process that ends before the others takes them with it after some minutes.
        distributed.wait_for_all("finished")
    return True


def _how_to_repeat(error: Exception) -> str:
    """The command that repeats an update that was not finite, where the error is of one."""
    step = getattr(error, "step", None)
    if step is None:
        return ""
    command = shlex.join([sys.executable, "-m", "tlcm_jax.main", *sys.argv[1:]])
    return f"\nto see which operation it is: {command} --debug_step {step}"


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags; an override that does not fit the recipe is an error of one line.

    What a recipe itself raises keeps its trace, which names the place.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        hint = "; --config.evaluation.prompts='()' leaves the evaluation out"
        sys.exit(f"error: {error}{hint * ('config.evaluation=' in str(error))}")
    except (AttributeError, KeyError, TypeError) as error:
        if any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        told: object = error
        while isinstance(told, BaseException):
            told = told.args[0]
        sys.exit(
            "error: an override of --config sets a part of what the recipe does not have: "
            f"{' '.join(str(told).split())}; give the whole, as --config.KEY=\"{{'part': 1}}\""
        )


def quiet_libraries() -> None:
    """Leaves out what libraries print for their authors; an error still ends the command."""
    # Orbax logs each of its options, and a failed save with its trace, through the same logger.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    told = sys.unraisablehook

    def hook(ignored: Any) -> None:
        # TensorStore's writes that outlive a save that failed, each with a trace from its thread.
        if str(ignored.exc_value) != "Event loop is closed":
            told(ignored)

    sys.unraisablehook = hook


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    quiet_libraries()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
