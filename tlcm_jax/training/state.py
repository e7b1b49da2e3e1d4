"""What one optimiser step changes: the training state of a stage.

Trained parameters and both Adam moments are float32 whatever the compute type of the network
(METHOD section 6); the frozen base is not part of the state and is never checkpointed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from tlcm_jax.training.players import Player

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """The state of one stage; a pytree, donated to every step.

    Attributes:
      step: int32 `[]`, steps of this stage that are done.
      trainable: pytree of float32 arrays, the leaves that the optimiser moves.
      opt_state: the optax state that belongs to `trainable`.
      key: typed PRNG key `[]` of the stage. It never changes: step k uses
        `fold_in(key, k)`, so a step is a function of (state, step) and a resumed run repeats it.
      players: (parameters, optax state) of each other player by name; empty where the student is
        the only one.
      average: moving average of `trainable` since the stage began; empty where none is kept.
    """

    step: Array
    trainable: PyTree
    opt_state: PyTree
    key: Array
    players: PyTree = flax.struct.field(default_factory=dict)
    average: PyTree = flax.struct.field(default_factory=dict)

    @property
    def student(self) -> tuple[PyTree, PyTree, PyTree]:
        """What an update of the student changes."""
        return self.trainable, self.opt_state, self.average

    def moved(self, student: tuple[PyTree, PyTree, PyTree]) -> "TrainState":
        """The same state with `student` changed."""
        trainable, opt_state, average = student
        return dataclasses.replace(self, trainable=trainable, opt_state=opt_state, average=average)

    @property
    def trained(self) -> PyTree:
        """What the stage leaves to sampling and export: the average, or else the leaves."""
        return self.average or self.trainable


def create(
    trainable: PyTree,
    optimizer: optax.GradientTransformation,
    key: Array,
    players: Mapping[str, Player] | None = None,
    average: bool = False,
) -> TrainState:
    """The state before a stage's first step.

    Args:
      trainable: pytree of arrays; floating leaves become float32. The values are copied, because
        a step donates its state and the caller's arrays must outlive it.
      optimizer: the optax transformation of the stage.
      key: typed PRNG key (`jax.random.key`) that no other stage uses.
      players: the other players; each begins by its own `initial`.
      average: whether an average of the trainable leaves is kept; it begins as these.

    Returns:
      A `TrainState` at step 0.
    """
    trainable = jax.tree.map(_own, trainable)
    others = {}
    for i, (name, player) in enumerate(sorted((players or {}).items())):
        # Counted down from the end of the range that steps, folded into the same key, count up.
        params = jax.tree.map(_own, player.initial(jax.random.fold_in(key, 2**32 - 1 - i)))
        others[name] = (params, player.optimizer.init(params))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        key=key,
        players=others,
        average=jax.tree.map(_own, trainable) if average else {},
    )


def _own(leaf: Array) -> Array:
    dtype = jnp.float32 if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None
    return jnp.array(leaf, dtype=dtype, copy=True)
