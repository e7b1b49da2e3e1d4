"""Distils a teacher: `python -m tlcm_jax.main --config configs/emoji.py --workdir runs/emoji`.

The same command resumes a run that was stopped.
"""

import sys
import time
import traceback

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
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw progress bars.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    compilation.CACHE,
    "Where compiled programs are kept from run to run; empty keeps none.",
)


def main(argv: list[str]) -> None:
    """Runs the recipe, then evaluates, reports and exports its student."""
    started = time.monotonic()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    # Before anything touches a backend.
    from tlcm_jax.training import distributed

    distributed.initialize()
    import jax

    compilation.use_cache(_CACHE.value)
    from tlcm_jax.config.run import train
    from tlcm_jax.evaluation.final_eval import Ending, brought_home, finish
    from tlcm_jax.evaluation.previews import preview_hooks
    from tlcm_jax.training.profile import parse_steps

    workdir = str(_WORKDIR.value)
    try:
        if "://" in workdir:
            raise ValueError(
                f"--workdir {workdir} is no folder: mount the bucket (gcsfuse, as "
                "launch/tpu_slice.sh does) and give the folder it is mounted on"
            )
        config = _CONFIG.value.to_dict()
        ending = Ending.prepare(config)
        run = train(
            config,
            workdir,
            progress=_PROGRESS.value,
            profile_steps=parse_steps(_PROFILE.value),
            make_hooks=lambda settings, model: preview_hooks(settings, model, workdir),
        )
        if not run.completed:
            logging.warning("stopped on request; the same command resumes this run")
            return
        run = brought_home(run, ending.settings)
        if jax.process_index() == 0:
            finish(run, ending, config, workdir, started=started, progress=_PROGRESS.value)
        # A process that ends before the others takes them with it after some minutes.
        distributed.wait_for_all("finished")
    except (ValueError, FileNotFoundError, OSError, RuntimeError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags; an override below a key that the recipe lacks is an error of one line.

    What a recipe itself raises keeps its trace, which names the place.
    """
    try:
        return app.parse_flags_with_usage(argv)
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


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    # Orbax logs each of its options, through the same logger.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
