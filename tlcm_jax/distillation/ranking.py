"""Two-alternative ranking: what trains a perceptual distance (Zhang et al., arXiv 1801.03924).

Of a reference r and two changes of it, which is closer? With d the distance that is trained and h
in 0..1 the share of judges who say the second,

    p = sigmoid(k (d(r, p0) - d(r, p1))),   loss = -h log p - (1 - h) log(1 - p).              (1)

A batch of triplets holds `reference`, `first` and `second`, `[b, h, w, c]` each, and `verdict`,
h, `[b]`.
"""

from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Triplets = Mapping[str, Array]


def ranking_loss(network: nn.Module) -> Callable:
    """Equation (1), `(params, triplets, key) -> (loss, metrics)`.

    `params` holds `network` and `slope`, log k.
    """

    def loss(
        params: PyTree[Array], batch: Triplets, key: PRNGKeyArray
    ) -> tuple[Array, dict[str, Array]]:
        del key
        difference = differences(network, params["network"], batch)
        logits = jnp.exp(params["slope"]) * difference
        right, verdict = jax.nn.log_sigmoid(logits), batch["verdict"]
        value = -jnp.mean(verdict * right + (1 - verdict) * (right - logits))  # (1)
        return value, {"agreement": agreement(difference, verdict)}

    return loss


def differences(network: nn.Module, params: PyTree[Array], batch: Triplets) -> Float[Array, " b"]:
    """d(r, p0) - d(r, p1) of triplets, `[b]`: positive where the second is the closer."""

    def distance(other: Array) -> Array:
        return network.apply({"params": params}, batch["reference"], other)

    return distance(batch["first"]) - distance(batch["second"])


def agreement(difference: Float[Array, " b"], verdict: Float[Array, " b"]) -> Float[Array, ""]:
    """The judges' share on the side of the ranking, as BAPPS scores it."""
    return jnp.mean(jnp.where(difference > 0, verdict, 1 - verdict))


def held_out(
    network: nn.Module, params: PyTree[Array], batches: Iterator[Triplets], count: int
) -> dict[str, float]:
    """Agreement on held-out triplets, the network's and that of the latents' mean square."""
    found: dict[str, list] = {"latent_lpips": [], "mean_square": []}
    compare = jax.jit(lambda params, batch: differences(network, params, batch))
    for _ in range(count):
        batch = next(batches)
        square = [
            jnp.mean((batch["reference"] - batch[k]) ** 2, axis=(1, 2, 3))
            for k in ("first", "second")
        ]
        for name, value in (
            ("latent_lpips", compare(params, batch)),
            ("mean_square", square[0] - square[1]),
        ):
            found[name].append(float(agreement(value, batch["verdict"])))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}
