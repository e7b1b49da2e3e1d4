"""Runs the stages of a recipe in order: the engine's outermost layer.

The student's parameters pass from stage to stage; each stage has a fresh optimiser and its own
PRNG key. Everything is a function of (state, position), so the same call resumes a run that was
interrupted and repeats it bit for bit.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tlcm_jax.training.begin import initial, resume
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.metrics import Meter, MetricsWriter, Progress, Row
from tlcm_jax.training.nonfinite import Skipped, say_skipped
from tlcm_jax.training.positions import Position
from tlcm_jax.training.preemption import Preemption
from tlcm_jax.training.profile import Profiler
from tlcm_jax.training.sharding import RULES, Rules
from tlcm_jax.training.stage import Stage, StageSpec
from tlcm_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
    """Something to do on the way, such as drawing samples.

    Attributes:
      every: after every so many steps of a stage, and at its end.
      call: gets the position and the state, which it must not keep: the next step donates it.
    """

    every: int
    call: Callable[[Position, TrainState], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How often the loop looks up from its steps.

    Attributes:
      log_every: steps of a stage between rows of metrics; the host waits for the device there.
      checkpoint_every: steps of a stage between checkpoints; a stage's end always has one. Where
        pairs depend on the student it is the first step from there on at which a run can resume
        (`PairStream.resumable`).
      progress: whether to draw a progress bar.
      max_skipped: so many updates in a row that are not finite, and are skipped, end the run, at
        the end of their row.
    """

    log_every: int = 10
    checkpoint_every: int = 500
    progress: bool = True
    max_skipped: int = 10

    def __post_init__(self) -> None:
        """Refuses intervals and limits below one."""
        if self.max_skipped < 1:
            raise ValueError(f"max_skipped must be at least 1, got {self.max_skipped}")
        if self.log_every < 1 or self.checkpoint_every < 1:
            raise ValueError(
                f"log_every and checkpoint_every must be at least 1, got {self.log_every} and "
                f"{self.checkpoint_every}"
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      state: the last state.
      position: where it is.
      history: the rows of `metrics.jsonl`.
      completed: False when the run was preempted; it saved, and the same command resumes it.
    """

    state: TrainState
    position: Position
    history: list[Row]
    completed: bool


def run(
    specs: Sequence[StageSpec],
    trainable: PyTree[Array],
    key: Array,
    *,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    settings: LoopSettings | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    hooks: Sequence[Hook] = (),
    profiler: Profiler | None = None,
    preemption: Preemption | None = None,
) -> Result:
    """Runs the stages, from the newest checkpoint if there is one.

    Args:
      specs: the stages, at least one, in order.
      trainable: the student's parameters, as before the first stage; copied, not donated.
      key: typed PRNG key of the run, the same on every process.
      checkpoints: where to save and resume.
      writer: where rows go.
      settings: intervals.
      mesh: the mesh of the steps; None for one device.
      rules: where the state lies there.
      hooks: what else to do on the way.
      profiler: traces some of the steps.
      preemption: already listening, for what comes before and after the stages too; None listens
        here.

    Returns:
      The final state and the history.

    Raises:
      NonFiniteError: too many updates in a row were not finite.
      RuntimeError: no checkpoint can be read.
      ValueError: a checkpoint that belongs to other stages or another state.
      OSError: no space left for a checkpoint, or the folder cannot be written; names the last
        good checkpoint.
    """
    settings = settings or LoopSettings()
    state, position = resume(specs, trainable, key, checkpoints, mesh, rules)
    writer.resume(position.total)
    with contextlib.ExitStack() as stack:
        preemption = preemption or stack.enter_context(Preemption())
        profiler = stack.enter_context(profiler or Profiler(None))
        preemption.settle = checkpoints.commit
        stack.enter_context(_naming_last_good(checkpoints))
        while True:
            spec = specs[position.stage]
            if state is None:
                state = initial(trainable, spec, key, position.stage, mesh, rules)
            stage = Stage(spec, mesh, rules)
            state, position, completed = _run_stage(
                stage,
                state,
                position,
                settings,
                checkpoints,
                writer,
                hooks,
                preemption,
                profiler,
            )
            if not completed or position.stage + 1 == len(specs):
                checkpoints.wait()
                return Result(state, position, writer.history, completed)
            trainable, state = state.student.params, None
            following = position.stage + 1
            position = Position(following, specs[following].name, 0, position.total)


@contextlib.contextmanager
def _naming_last_good(checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to an error of the disk what the run can go on from."""
    try:
        yield
    except OSError as error:
        if "last good checkpoint" in str(error):
            raise
        reason = error.strerror or str(error)
        path = f" {error.filename}" if error.filename else ""
        raise OSError(
            error.errno, f"{reason}{path}; the last good checkpoint is {checkpoints.last_good()}"
        ) from error


def _run_stage(
    stage: Stage,
    state: TrainState,
    position: Position,
    settings: LoopSettings,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    hooks: Sequence[Hook],
    preemption: Preemption,
    profiler: Profiler,
) -> tuple[TrainState, Position, bool]:
    """Runs a stage to its end, or to a preemption (the bool is then False)."""
    spec = stage.spec
    meter = Meter(spec.nfe_per_pair, spec.pairs.batch_size)
    show = settings.progress and jax.process_index() == 0
    progress = Progress(spec.name, position.step, spec.steps, show)
    ended = _ended(spec, writer.history)
    rows = [row for row in writer.history if row["stage"] == spec.name]
    skipped = Skipped(settings.max_skipped, spec.steps, rows)
    save_due = False
    try:
        while position.step < spec.steps and not ended:
            # Invariant: `state` is the state after `position.step` steps and has seen exactly the
            # mini-batches before that number. The position moves together with the state, and the
            # next batch is drawn only after the save, so what is saved never counts a batch it has
            # not trained on.
            meter.start()
            profiler.before(position.total + 1)
            pairs = stage.stream.next(position.step, state, spec.frozen)
            state, metrics = stage.step(state, spec.frozen, pairs)
            step = position.step + 1
            position = dataclasses.replace(position, step=step, total=position.total + 1)
            meter.add(metrics)
            preemption.unsaved = True
            progress.at(meter.ready())

            stop_asked = preemption.requested(position.total)
            save_due = save_due or step % settings.checkpoint_every == 0
            end = step == spec.steps
            resumable = end or stage.stream.resumable(step)
            stop = stop_asked and resumable
            save = stop or end or (save_due and resumable)
            due = [hook for hook in hooks if end or step % hook.every == 0]
            if save or due or step % settings.log_every == 0:
                # Rows end where checkpoints are, so a resumed run writes the rows that an
                # uninterrupted one would have.
                row, updates = meter.collect()
                row |= skipped.add(updates)
                say_skipped(spec.name, step, row)
                progress.settle(row)
                names = {"step": position.total, "stage": spec.name, "stage_step": step}
                writer.write({**names, **row})
                if skipped.over:
                    checkpoints.wait()
                    raise skipped.report(stage, state, position, writer.folder)
                ended = _ended(spec, writer.history)
                if ended:
                    logging.warning("stage %s ends at step %d: %s", spec.name, step, ended)
                    end = save = True
                    due = list(hooks)
            for hook in due:
                # Before the save: a run that dies in a hook comes back to it.
                hook.call(position, state)
            if save:
                checkpoints.save(position, state, stage_end=end, row=writer.history[-1])
                preemption.unsaved = save_due = False
            if stop and not end:
                checkpoints.wait()
                logging.warning("asked to stop: saved %s", checkpoints.last_good())
                return state, position, False
    finally:
        progress.close()
    return state, position, True


def _ended(spec: StageSpec, history: Sequence[Row]) -> str:
    """Why the stage is over before its last step, or ""."""
    # A row whose updates were all skipped has no values to decide by.
    rows = [row for row in history if row["stage"] == spec.name]
    rows = [row for row in rows if row.get("loss") is not None]
    return spec.should_stop(rows)
