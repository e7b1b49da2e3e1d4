"""The train step: one optimiser update of one network, jitted, donated, sharded.

With theta the network's parameters, l its loss, and a key for each sample i of a batch,

  g = mean_i grad_theta l_i(theta, frozen, batch_i, key_i, others)                       (1)
  theta <- theta + optimiser(g)                                                          (2)

and of the student, where a stage asks for it, an exponential moving average of decay d, which
begins as the parameters:

  ema <- d ema + (1 - d) theta.                                                          (3)

An update that is not finite is left out: parameters, optimiser and EMA stay as they were, bit for
bit. The mean (1) may be taken over micro-batches, which costs the memory of one. An auxiliary
network's update is the same function with another loss. The engine knows no loss by name.
"""

import zlib
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tlcm_jax.training.mesh import replicated, traced_on
from tlcm_jax.training.sharding import RULES, Rules, tree_shardings
from tlcm_jax.training.state import STUDENT, NetworkState, TrainState

Metrics = dict[str, Array]
# (params, frozen, batch, keys [n], others) -> (per_sample [n], metrics, scalars or [n]).
Loss = Callable[..., tuple[Float[Array, " n"], Metrics]]
# What an update reports of its own.
OWN_METRICS = ("loss", "grad_norm", "param_norm", "finite")
# The name under which a loss is given the student's own EMA, among the other networks.
EMA = "ema"


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    network: str = STUDENT,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the update of one network of the state.

    Args:
      loss: `(params, frozen, batch, keys, others) -> (per_sample [n], metrics)`; `others` holds
        the parameters of the state's other networks by name, and the network's own EMA as `EMA`
        where one is kept.
      optimizer: an optax transformation, clipping included.
      network: which of `TrainState.networks` it moves.
      accumulate: micro-batches of an update.
      ema_decay: d of (3); 0 keeps none.
      mesh: what the arguments lie on; None for one device.
      rules: where the state lies there.

    Returns:
      A jitted `update(state, frozen, batch, turn=0) -> (state, metrics)`. The state is donated:
      use the returned one. `turn` counts the updates of a network within a step. The student's
      update ends the step. Metrics are float32 scalars on the device: `loss` and the loss's own,
      means over the batch; `grad_norm` before clipping; `param_norm` after the update; and
      `finite`, a bool, whether all three are, and so whether the update was done.

    Raises:
      ValueError: (when first called, before anything is compiled) a batch that the micro-batches
        cannot divide, a loss that is not one value a sample, a metric of one of the update's own
        names.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in 0 (none) to below 1, got {ema_decay}")
    gradient = jax.grad(partial(_mean_loss, loss), has_aux=True)
    salt = 0 if network == STUDENT else zlib.crc32(network.encode())

    def update(
        state: TrainState, frozen: PyTree[Array], batch: PyTree[Array], turn: int | Array = 0
    ) -> tuple[TrainState, Metrics]:
        own = state.networks[network]
        others = {name: net.params for name, net in state.networks.items() if name != network}
        if ema_decay:
            others[EMA] = own.ema
        keys = sample_keys(state, jax.tree.leaves(batch)[0].shape[0], salt, turn)
        micro = _micro_batches((batch, keys), accumulate)
        first = jax.tree.map(lambda x: x[0], micro)
        total = gradient(own.params, frozen, *first, others)
        if accumulate > 1:

            def add(total: PyTree[Array], piece: PyTree[Array]) -> tuple[PyTree[Array], None]:
                more = gradient(own.params, frozen, *piece, others)
                return jax.tree.map(jnp.add, total, more), None

            rest = jax.tree.map(lambda x: x[1:], micro)
            # XLA on CPU brings a convolution's gradients to its fast form only outside loops.
            unroll = accumulate if jax.default_backend() == "cpu" else 1
            total, _ = jax.lax.scan(add, total, rest, unroll=unroll)
        grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
        changes, opt_state = optimizer.update(grads, own.opt_state, own.params)
        params = optax.apply_updates(own.params, changes)
        ema = own.ema
        if ema_decay:
            ema = jax.tree.map(
                lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params
            )  # (3)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        metrics = {**metrics, **norms}
        watched = jnp.stack([metrics["loss"], *norms.values()])
        metrics["finite"] = finite = jnp.all(jnp.isfinite(watched))
        moved = NetworkState(params, opt_state, ema)
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, own)
        networks = {**state.networks, network: moved}
        step = state.step + 1 if network == STUDENT else state.step
        state = TrainState(step=step, key=state.key, networks=networks)
        if mesh is not None:
            # New leaves and moments lie as the donated ones did.
            wanted = tree_shardings(state, mesh, rules)
            state = jax.lax.with_sharding_constraint(state, wanted)
            metrics = jax.lax.with_sharding_constraint(metrics, replicated(mesh))
        return state, metrics

    return jax.jit(traced_on(mesh, update), donate_argnums=0)


def sample_keys(state: TrainState, count: int, salt: int, turn: int | Array = 0) -> PRNGKeyArray:
    """A key for each of `count` samples of a batch, `[count]`, that nothing else uses.

    Args:
      state: of the step.
      count: samples.
      salt: of who draws; 0 is the student's update.
      turn: of the draw within the step.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), salt)
    return jax.random.split(jax.random.fold_in(key, turn), count)


def _micro_batches(tree: PyTree[Array], accumulate: int) -> PyTree[Array]:
    """Leaves `[n, ...]` to `[accumulate, n / accumulate, ...]`."""
    count = jax.tree.leaves(tree)[0].shape[0]
    if count % accumulate:
        raise ValueError(f"a batch of {count} cannot be cut into {accumulate} micro-batches")

    def cut(leaf: Array) -> Array:
        # Neighbours stay on their device: a micro-batch takes every `accumulate`-th sample.
        return jnp.moveaxis(leaf.reshape(count // accumulate, accumulate, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(cut, tree)


def _mean_loss(
    loss_function: Loss,
    params: PyTree[Array],
    frozen: PyTree[Array],
    batch: PyTree[Array],
    keys: PRNGKeyArray,
    others: Mapping[str, PyTree[Array]],
) -> tuple[Float[Array, ""], Metrics]:
    per_sample, metrics = loss_function(params, frozen, batch, keys, others)
    if per_sample.ndim != 1:
        raise ValueError(f"a loss must give one value a sample, [n], got {per_sample.shape}")
    clash = set(metrics) & set(OWN_METRICS)
    if clash:
        raise ValueError(f"metrics {sorted(clash)} are the update's own: rename the loss's")
    loss = jnp.mean(per_sample.astype(jnp.float32))
    means = {name: jnp.mean(value.astype(jnp.float32)) for name, value in metrics.items()}
    return loss, {**means, "loss": loss}
