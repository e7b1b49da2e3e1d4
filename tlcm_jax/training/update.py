"""The update rule of every network in a step: the mean gradient of micro-batches, then optax.

With theta the network's leaves, l its loss, and a key for each micro-batch j,

  g = mean_j grad_theta mean_i l_i(theta, frozen, examples_j, key_j)                     (1)
  theta <- theta + optimiser(g)                                                          (2)

and of the student, where a stage asks for it, an average of what it has been. It begins with the
stage as theta itself, and remembers some 1 / (1 - d) updates:

  average <- d average + (1 - d) theta                                                   (3)
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from tlcm_jax.training.sharding import Rules, tree_shardings

PyTree = Any
Metrics = dict[str, Array]

# What the step itself reports; an objective's metrics may not carry these names.
OWN_METRICS = ("loss", "grad_norm", "grad_norm_max", "examples", "finite")
# Under what name a loss sees the average of (3), beside the other players' parameters.
AVERAGE = "average"


def student_update(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    rules: Rules,
    ema_decay: float = 0.0,
) -> Callable:
    """Equations (1) to (3) for the student.

    Args:
      loss: `(trainable, frozen, examples, key[, seen]) -> (per_sample, metrics)`; with other
        players or an average it gets `seen`, their parameters by name.
      optimizer: an optax transformation, clipping included.
      mesh: what the leaves lie on; None for one device.
      rules: where they lie there.
      ema_decay: d of (3); 0 keeps no average.

    Returns:
      `(carry, frozen, examples [accumulate, m, ...], keys, others, loop) -> (carry, metrics)` with
      carry = (trainable, optax state, average), the last an empty dict where none is kept; `loop`
      chooses a scan over the micro-batches.
    """

    def update(
        carry: tuple[PyTree, PyTree, PyTree],
        frozen: PyTree,
        examples: PyTree,
        keys: Array,
        others: Mapping[str, PyTree] | None = None,
        loop: bool = False,
    ) -> tuple[tuple[PyTree, PyTree, PyTree], Metrics]:
        trainable, opt_state, average = carry
        seen = {**(others or {}), **({AVERAGE: average} if ema_decay else {})}
        (trainable, opt_state), metrics = _descend(
            loss, optimizer, (trainable, opt_state), frozen, examples, keys, seen, loop
        )
        if ema_decay:
            average = jax.tree.map(
                lambda old, new: ema_decay * old + (1 - ema_decay) * new, average, trainable
            )  # (3)
        # As in the state, for the rules.
        named = {"trainable": trainable, "opt_state": opt_state, "average": average}
        lying = _placed(named, mesh, rules)
        return (lying["trainable"], lying["opt_state"], lying["average"]), metrics

    return update


def player_update(
    name: str,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    rules: Rules,
) -> Callable:
    """Equations (1) and (2) for another player; as `student_update`, of (params, optax state)."""

    def update(
        carry: tuple[PyTree, PyTree],
        frozen: PyTree,
        examples: PyTree,
        keys: Array,
        loop: bool = False,
    ) -> tuple[tuple[PyTree, PyTree], Metrics]:
        carry, metrics = _descend(loss, optimizer, carry, frozen, examples, keys, {}, loop)
        return _placed({"players": {name: carry}}, mesh, rules)["players"][name], metrics

    return update


def _descend(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    carry: tuple[PyTree, PyTree],
    frozen: PyTree,
    examples: PyTree,
    keys: Array,
    seen: Mapping[str, PyTree],
    loop: bool,
) -> tuple[tuple[PyTree, PyTree], Metrics]:
    """Equations (1) and (2); `seen` is the same for every micro-batch."""
    trainable, opt_state = carry
    more = (seen,) if seen else ()
    mean_loss_gradient = jax.grad(partial(_mean_loss, loss), has_aux=True)

    def gradient(trainable: PyTree, frozen: PyTree, examples: PyTree, key: Array) -> tuple:
        return mean_loss_gradient(trainable, frozen, examples, key, *more)

    def add(total: tuple, micro: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, frozen, *micro)), None

    pieces = keys.shape[0]
    if loop and pieces > 1:
        first = jax.tree.map(lambda x: x[0], (examples, keys))
        shapes = jax.eval_shape(gradient, trainable, frozen, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (examples, keys))
    else:
        micros = [jax.tree.map(lambda x, i=i: x[i], (examples, keys)) for i in range(pieces)]
        total = gradient(trainable, frozen, *micros[0])
        for micro in micros[1:]:
            total, _ = add(total, micro)
    grads, metrics = jax.tree.map(lambda x: x / pieces, total)
    norm = optax.tree.norm(grads)
    changes, opt_state = optimizer.update(grads, opt_state, trainable)
    return (optax.apply_updates(trainable, changes), opt_state), {**metrics, "grad_norm": norm}


def _placed(named: dict[str, PyTree], mesh: Mesh | None, rules: Rules) -> dict[str, PyTree]:
    """New leaves and moments, lying as the donated ones did."""
    if mesh is None:
        return named
    return jax.lax.with_sharding_constraint(named, tree_shardings(named, mesh, rules))


def _mean_loss(
    loss_function: Callable,
    trainable: PyTree,
    frozen: PyTree,
    examples: PyTree,
    key: Array,
    *seen: PyTree,
) -> tuple[Array, Metrics]:
    per_sample, metrics = loss_function(trainable, frozen, examples, key, *seen)
    if per_sample.ndim != 1:
        raise ValueError(f"a loss must give one value a sample, [n], got {per_sample.shape}")
    clash = set(metrics) & set(OWN_METRICS)
    if clash:
        raise ValueError(f"metrics {sorted(clash)} are the step's own: rename the objective's")
    loss = jnp.mean(per_sample.astype(jnp.float32))
    means = {name: jnp.mean(value.astype(jnp.float32)) for name, value in metrics.items()}
    return loss, {**means, "loss": loss}
