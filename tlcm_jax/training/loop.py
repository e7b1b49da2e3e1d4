"""Runs the stages of a recipe in order: the engine's outermost layer.

The student's parameters pass from stage to stage; each stage has a fresh optimiser and its own
PRNG key. Everything is a function of (state, position), so the same call resumes a run that was
interrupted and repeats it bit for bit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.metrics import Meter, MetricsWriter, Progress, Row
from tlcm_jax.training.positions import Position
from tlcm_jax.training.preemption import Preemption
from tlcm_jax.training.profile import Profiler
from tlcm_jax.training.sharding import RULES, Rules, place, tree_shardings
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
    """

    log_every: int = 10
    checkpoint_every: int = 500
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses intervals below one step."""
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

    Returns:
      The final state and the history.

    Raises:
      RuntimeError: a loss, gradient or update that is not finite; names the last good checkpoint.
      ValueError: a checkpoint that belongs to other stages or another state.
      OSError: no space left for a checkpoint.
    """
    settings = settings or LoopSettings()
    position = checkpoints.latest()
    writer.resume(position.total if position else 0)
    state = None
    if position is not None:
        _check_position(position, specs)
        spec = specs[position.stage]
        state = checkpoints.restore(_template(trainable, spec, key, position.stage, mesh, rules))
        logging.info("resuming %s at step %d of %d", spec.name, position.step, spec.steps)
    else:
        position = Position(stage=0, name=specs[0].name, step=0, total=0)
    with Preemption() as preemption, profiler or Profiler(None) as profiler:
        while True:
            spec = specs[position.stage]
            if state is None:
                state = _initial(trainable, spec, key, position.stage, mesh, rules)
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
                # uninterrupted one would have; and no state is saved before it is known finite.
                row, bad = meter.collect()
                if bad is not None:
                    checkpoints.wait()  # for the last good one to be named
                    raise RuntimeError(
                        _not_finite(spec, step - row["steps"] + bad + 1, row, checkpoints)
                    )
                progress.settle(row)
                names = {"step": position.total, "stage": spec.name, "stage_step": step}
                writer.write({**names, **row})
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
                save_due = False
            if stop and not end:
                checkpoints.wait()
                logging.warning("asked to stop: saved %s", checkpoints.last_good())
                return state, position, False
    finally:
        progress.close()
    return state, position, True


def _ended(spec: StageSpec, history: Sequence[Row]) -> str:
    """Why the stage is over before its last step, or ""."""
    return spec.should_stop([row for row in history if row["stage"] == spec.name])


def _not_finite(spec: StageSpec, step: int, row: Row, checkpoints: Checkpoints) -> str:
    return (
        f"stage {spec.name!r}, step {step}: the loss, its gradient or the update is not finite "
        f"(over the last {row['steps']} steps loss {row['loss']:.4g}, gradient norm up to "
        f"{row['grad_norm_max']:.4g}). The last good checkpoint is {checkpoints.last_good()}. Try "
        f"a lower learning rate or a longer warm-up; if the loss was steady before, look at the "
        f"batch of that step"
    )


def _check_position(position: Position, specs: Sequence[StageSpec]) -> None:
    names = [spec.name for spec in specs]
    if position.stage >= len(specs) or names[position.stage] != position.name:
        raise ValueError(
            f"the checkpoint is of stage {position.stage} ({position.name!r}), but this run's "
            f"stages are {names}: use the config it was made with, or another workdir"
        )
    if position.step > specs[position.stage].steps:
        raise ValueError(
            f"the checkpoint is at step {position.step} of stage {position.name!r}, which now has "
            f"only {specs[position.stage].steps}: raise its steps, or use another workdir"
        )


def _create(spec: StageSpec, key: Array, index: int) -> Callable[[Any, Any], TrainState]:
    # A key of its own for each stage: steps count from 0 in each, and fold into this key.
    impl = jax.random.key_impl(key)

    def make(trainable: PyTree[Array], key_data: Array) -> TrainState:
        run_key = jax.random.wrap_key_data(key_data, impl=impl)
        return spec.create_state(trainable, jax.random.fold_in(run_key, index))

    return make


def _initial(
    trainable: PyTree[Array], spec: StageSpec, key: Array, index: int, mesh: Mesh | None,
    rules: Rules,
) -> TrainState:  # fmt: skip
    make, data = _create(spec, key, index), np.asarray(jax.random.key_data(key))
    if mesh is None:
        return jax.jit(make)(trainable, data)
    shardings = tree_shardings(jax.eval_shape(make, trainable, data), mesh, rules)
    placed = place({"trainable": trainable}, mesh, rules)["trainable"]
    return jax.jit(make, out_shardings=shardings)(placed, data)


def _template(
    trainable: PyTree[Array], spec: StageSpec, key: Array, index: int, mesh: Mesh | None,
    rules: Rules,
) -> TrainState:  # fmt: skip
    make, data = _create(spec, key, index), np.asarray(jax.random.key_data(key))
    shapes = jax.eval_shape(make, trainable, data)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    else:
        shardings = tree_shardings(shapes, mesh, rules)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
