"""Runs the stages of a recipe in order: the engine's outermost layer.

The trained leaves pass from stage to stage; each stage has a fresh optimiser and its own PRNG
key. Everything is a function of (state, position), so the same call resumes a run that was
interrupted and repeats it bit for bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax import Array
from jax.sharding import Mesh

from tlcm_jax.training.checkpoints import Checkpoints, Position
from tlcm_jax.training.metrics import Meter, MetricsWriter, Progress, Row
from tlcm_jax.training.players import Player
from tlcm_jax.training.preemption import Preemption
from tlcm_jax.training.sharding import RULES, Rules, place, tree_shardings
from tlcm_jax.training.state import TrainState, create

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, prepared: what the loop needs to know of it.

    Attributes:
      name: shown in the progress bar, rows and messages.
      step: `step(state, frozen, batch) -> (state, metrics)`, as `step.make_step` builds it.
      optimizer: the optax transformation inside `step`.
      steps: how many steps the stage has, at least 1.
      batches: batch number k of the stage, on the devices. A pure function of k.
      evaluations_per_example: UNet forward evaluations an example costs, for the throughput.
      players: who else is trained inside `step`, by name; they live for this stage only.
      average: whether `step` keeps an average of the student, of this stage only: the next one
        trains the leaves themselves.
      enough: looks at the stage's rows after each, and says why the stage should end there, or
        "". A pure function of the rows, so that a resumed run ends where the first did
        (but for the shorter row that a preemption leaves).
    """

    name: str
    step: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Array]]]
    optimizer: optax.GradientTransformation
    steps: int
    batches: Callable[[int], PyTree]
    evaluations_per_example: float
    players: Mapping[str, Player] = dataclasses.field(default_factory=dict)
    average: bool = False
    enough: Callable[[Sequence[Row]], str] = lambda rows: ""

    def __post_init__(self) -> None:
        """Refuses a stage without steps."""
        if self.steps < 1:
            raise ValueError(f"stage {self.name!r} has {self.steps} steps: set at least 1")


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
      checkpoint_every: steps of a stage between checkpoints; a stage's end always has one.
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
    stages: Sequence[Stage],
    trainable: PyTree,
    frozen: PyTree,
    key: Array,
    *,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    settings: LoopSettings | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    hooks: Sequence[Hook] = (),
) -> Result:
    """Runs the stages, from the newest checkpoint if there is one.

    Args:
      stages: at least one, in order.
      trainable: pytree of the leaves to train, as before the first stage; copied, not donated.
      frozen: pytree of everything else that the steps read, already placed.
      key: typed PRNG key of the run, the same on every process.
      checkpoints: where to save and resume.
      writer: where rows go.
      settings: intervals.
      mesh: the mesh of the steps; None for one device.
      rules: where the state lies, as for `step.make_step`.
      hooks: what else to do on the way.

    Returns:
      The final state and the history.

    Raises:
      RuntimeError: a loss or gradient that is not finite; names the last good checkpoint.
      ValueError: a checkpoint that belongs to other stages or another state.
      OSError: no space left for a checkpoint.
    """
    settings = settings or LoopSettings()
    position = checkpoints.latest()
    writer.resume(position.total if position else 0)
    state = None
    if position is not None:
        _check_position(position, stages)
        stage = stages[position.stage]
        state = checkpoints.restore(_template(trainable, stage, key, position.stage, mesh, rules))
        logging.info("resuming %s at step %d of %d", stage.name, position.step, stage.steps)
    else:
        position = Position(stage=0, name=stages[0].name, step=0, total=0)
    with Preemption() as preemption:
        while True:
            stage = stages[position.stage]
            if state is None:
                state = _initial(trainable, stage, key, position.stage, mesh, rules)
            state, position, completed = _run_stage(
                stage, state, position, frozen, settings, checkpoints, writer, hooks, preemption
            )
            if not completed or position.stage + 1 == len(stages):
                return Result(state, position, writer.history, completed)
            trainable, state = state.trainable, None
            following = position.stage + 1
            position = Position(following, stages[following].name, 0, position.total)


def _run_stage(
    stage: Stage,
    state: TrainState,
    position: Position,
    frozen: PyTree,
    settings: LoopSettings,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    hooks: Sequence[Hook],
    preemption: Preemption,
) -> tuple[TrainState, Position, bool]:
    """Runs a stage to its end, or to a preemption (the bool is then False)."""
    meter = Meter(stage.evaluations_per_example)
    show = settings.progress and jax.process_index() == 0
    progress = Progress(stage.name, position.step, stage.steps, show)
    ended = _ended(stage, writer.history)
    try:
        while position.step < stage.steps and not ended:
            # Invariant: `state` is the state after `position.step` steps and has seen exactly the
            # batches before that number. The position moves together with the state, and the next
            # batch is drawn only after the save, so what is saved never counts a batch it has not
            # trained on.
            meter.start()
            state, metrics = stage.step(state, frozen, stage.batches(position.step))
            step = position.step + 1
            position = dataclasses.replace(position, step=step, total=position.total + 1)
            meter.add(metrics)
            progress.at(meter.ready())

            stop = preemption.requested(position.total)
            end = step == stage.steps
            save = stop or end or step % settings.checkpoint_every == 0
            due = [hook for hook in hooks if end or step % hook.every == 0]
            if save or due or step % settings.log_every == 0:
                # Rows end where checkpoints are, so a resumed run writes the rows that an
                # uninterrupted one would have; and no state is saved before it is known finite.
                row, bad = meter.collect()
                if bad is not None:
                    raise RuntimeError(
                        _not_finite(stage, step - row["steps"] + bad + 1, row, checkpoints)
                    )
                progress.settle(row)
                names = {"step": position.total, "stage": stage.name, "stage_step": step}
                writer.write({**names, **row})
                ended = _ended(stage, writer.history)
                if ended:
                    logging.warning("stage %s ends at step %d: %s", stage.name, step, ended)
                    end = save = True
                    due = list(hooks)
            for hook in due:
                # Before the save: a run that dies in a hook comes back to it.
                hook.call(position, state)
            if save:
                checkpoints.save(position, state)
            if stop and not end:
                logging.warning("asked to stop: saved %s", checkpoints.last_good())
                return state, position, False
    finally:
        progress.close()
    return state, position, True


def _ended(stage: Stage, history: Sequence[Row]) -> str:
    """Why the stage is over before its last step, or ""."""
    return stage.enough([row for row in history if row["stage"] == stage.name])


def _not_finite(stage: Stage, step: int, row: Row, checkpoints: Checkpoints) -> str:
    return (
        f"stage {stage.name!r}, step {step}: the loss or its gradient is not finite (over the last "
        f"{row['steps']} steps loss {row['loss']:.4g}, gradient norm up to "
        f"{row['grad_norm_max']:.4g}). The last good checkpoint is {checkpoints.last_good()}. Try "
        f"a lower learning rate or a longer warm-up; if the loss was steady before, look at the "
        f"batch of that step"
    )


def _check_position(position: Position, stages: Sequence[Stage]) -> None:
    names = [stage.name for stage in stages]
    if position.stage >= len(stages) or names[position.stage] != position.name:
        raise ValueError(
            f"the checkpoint is of stage {position.stage} ({position.name!r}), but this run's "
            f"stages are {names}: use the config it was made with, or another workdir"
        )
    if position.step > stages[position.stage].steps:
        raise ValueError(
            f"the checkpoint is at step {position.step} of stage {position.name!r}, which now has "
            f"only {stages[position.stage].steps}: raise its steps, or use another workdir"
        )


def _create(stage: Stage, key: Array, index: int) -> Callable[[PyTree, Array], TrainState]:
    # A key of its own for each stage: steps count from 0 in each, and fold into this key.
    impl = jax.random.key_impl(key)

    def make(trainable: PyTree, key_data: Array) -> TrainState:
        run_key = jax.random.wrap_key_data(key_data, impl=impl)
        stage_key = jax.random.fold_in(run_key, index)
        return create(trainable, stage.optimizer, stage_key, stage.players, stage.average)

    return make


def _initial(
    trainable: PyTree, stage: Stage, key: Array, index: int, mesh: Mesh | None, rules: Rules
) -> TrainState:
    make, data = _create(stage, key, index), np.asarray(jax.random.key_data(key))
    if mesh is None:
        return jax.jit(make)(trainable, data)
    shardings = tree_shardings(jax.eval_shape(make, trainable, data), mesh, rules)
    placed = place({"trainable": trainable}, mesh, rules)["trainable"]
    return jax.jit(make, out_shardings=shardings)(placed, data)


def _template(
    trainable: PyTree, stage: Stage, key: Array, index: int, mesh: Mesh | None, rules: Rules
) -> TrainState:
    make, data = _create(stage, key, index), np.asarray(jax.random.key_data(key))
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
