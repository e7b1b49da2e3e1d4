"""The state that a run begins with: its newest checkpoint's, or a stage's first."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.positions import Position
from tlcm_jax.training.sharding import Rules, place, tree_shardings
from tlcm_jax.training.stage import StageSpec
from tlcm_jax.training.state import TrainState


def resume(
    specs: Sequence[StageSpec], trainable: PyTree[Array], key: Array, checkpoints: Checkpoints,
    mesh: Mesh | None, rules: Rules,
) -> tuple[TrainState | None, Position]:  # fmt: skip
    """The state and place of the newest checkpoint, or None and the run's beginning.

    Raises:
      ValueError: the checkpoint is of other stages or another state.
      RuntimeError: no checkpoint can be read.
    """
    position = checkpoints.latest()
    if position is None:
        return None, Position(stage=0, name=specs[0].name, step=0, total=0)
    _check_position(position, specs)
    spec = specs[position.stage]
    state = checkpoints.restore(_template(trainable, spec, key, position.stage, mesh, rules))
    if int(state.step) != position.step:
        raise ValueError(
            f"checkpoint {checkpoints.last_good()} says that it is of step {position.step}, and "
            f"its state is of step {int(state.step)}: remove that folder to go on from an older one"
        )
    logging.info("resuming %s at step %d of %d", spec.name, position.step, spec.steps)
    return state, position


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


def initial(
    trainable: PyTree[Array], spec: StageSpec, key: Array, index: int, mesh: Mesh | None,
    rules: Rules,
) -> TrainState:  # fmt: skip
    """The state before the first step of stage `index`."""
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
