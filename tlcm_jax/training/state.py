"""What training changes: the state of a stage.

Trained parameters and both Adam moments are float32 whatever the compute type of the network; the
frozen base is not part of the state and is never checkpointed.
"""

import dataclasses
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

STUDENT = "student"


@flax.struct.dataclass
class NetworkState:
    """A network that is trained.

    Attributes:
      params: pytree of float32 arrays, the leaves that the optimiser moves.
      opt_state: the optax state that belongs to `params`.
      ema: exponential moving average of `params` since the stage began; empty where none is kept.
    """

    params: PyTree[Array]
    opt_state: PyTree[Array]
    ema: PyTree[Array]


@flax.struct.dataclass
class TrainState:
    """The state of one stage; a pytree, donated to every update.

    Attributes:
      step: int32 `[]`, updates of the student in this stage that are done.
      key: typed PRNG key `[]` of the stage. It never changes: step k uses `fold_in(key, k)`, so a
        step is a function of (state, step) and a resumed run repeats it.
      networks: the student as `STUDENT`, and the auxiliary networks, by name.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    networks: dict[str, NetworkState]

    @property
    def student(self) -> NetworkState:
        """The student's state."""
        return self.networks[STUDENT]

    @property
    def trained(self) -> PyTree[Array]:
        """What the stage leaves to sampling and export: the EMA, or else the parameters."""
        return self.student.ema or self.student.params


@dataclasses.dataclass(frozen=True)
class Aux:
    """An auxiliary network before a stage's first step.

    Attributes:
      init: `(key) -> params`.
      optimizer: its optax transformation.
    """

    init: Callable[[PRNGKeyArray], PyTree[Array]]
    optimizer: optax.GradientTransformation


def create(
    params: PyTree[Array],
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    aux: Mapping[str, Aux] | None = None,
    ema: bool = False,
) -> TrainState:
    """The state before a stage's first step.

    Args:
      params: the student's; floating leaves become float32. The values are copied, because an
        update donates its state and the caller's arrays must outlive it.
      optimizer: the student's.
      key: typed PRNG key (`jax.random.key`) that no other stage uses.
      aux: the auxiliary networks by name; each begins by its own `init`.
      ema: whether an EMA of the student is kept; it begins as its parameters.

    Returns:
      A `TrainState` at step 0.
    """
    params = jax.tree.map(_own, params)
    average = jax.tree.map(_own, params) if ema else {}
    networks = {STUDENT: NetworkState(params, optimizer.init(params), average)}
    for i, (name, network) in enumerate(sorted((aux or {}).items())):
        # Counted down from the end of the range that steps, folded into the same key, count up.
        weights = jax.tree.map(_own, network.init(jax.random.fold_in(key, 2**32 - 1 - i)))
        networks[name] = NetworkState(weights, network.optimizer.init(weights), {})
    return TrainState(step=jnp.zeros((), jnp.int32), key=key, networks=networks)


def _own(leaf: Array) -> Array:
    dtype = jnp.float32 if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None
    return jnp.array(leaf, dtype=dtype, copy=True)
