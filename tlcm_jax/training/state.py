"""What one optimiser step changes: the training state of a stage.

Trained parameters and both Adam moments are float32 whatever the compute type of the network
(METHOD section 6); the frozen base is not part of the state and is never checkpointed.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

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
    """

    step: Array
    trainable: PyTree
    opt_state: PyTree
    key: Array


def create(trainable: PyTree, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before a stage's first step.

    Args:
      trainable: pytree of arrays; floating leaves become float32. The values are copied, because
        a step donates its state and the caller's arrays must outlive it.
      optimizer: the optax transformation of the stage.
      key: typed PRNG key (`jax.random.key`) that no other stage uses.

    Returns:
      A `TrainState` at step 0.
    """
    trainable = jax.tree.map(_own, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        key=key,
    )


def _own(leaf: Array) -> Array:
    dtype = jnp.float32 if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None
    return jnp.array(leaf, dtype=dtype, copy=True)
