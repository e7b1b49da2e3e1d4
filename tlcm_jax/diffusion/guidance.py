"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    x_w(z, t, c) = x(z, t, null) + w (x(z, t, c) - x(z, t, null))                (1)

with x the predicted x0: at one z and t, x0 is affine in eps, so (1) is the usual equation in eps.
w = 1 is the conditional model itself, and is called as such; TLCM's teacher has w = 8, fixed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

# (z, t, conditioning) -> x0, float32. Conditioning is an opaque pytree of arrays whose leading
# axis is the batch.
Denoiser = Callable[
    [Float[Array, " b *latent"], Num[Array, " b"], PyTree[Array]], Float[Array, " b *latent"]
]
# A conditioning to the one that guidance moves away from; of the same structure, with a leading
# axis of b or 1.
NullOf = Callable[[PyTree[Array]], PyTree[Array]]


def guided(denoiser: Denoiser, scale: float, null_of: NullOf) -> Denoiser:
    """Equation (1) as a `Denoiser`: one call of `denoiser`, on a batch of 2b (of b if w = 1).

    Args:
      denoiser: the network without guidance.
      scale: w.
      null_of: the unconditional conditioning that belongs to a conditional one.
    """
    both = guided_and_plain(denoiser, scale, null_of)
    return lambda z, t, conditioning: both(z, t, conditioning)[0]


def guided_and_plain(denoiser: Denoiser, scale: float, null_of: NullOf) -> Callable:
    """As `guided`, but gives x_w and, from the same call, the conditional model's own x0."""
    if scale == 1:

        def plain(z, t, conditioning):
            x0 = denoiser(z, t, conditioning)
            return x0, x0

        return plain

    def denoise(z, t, conditioning):
        # Null and conditional lie side by side, sample by sample: merging the new axis *under*
        # the batch axis keeps every sample on the device that holds it, where a concatenation
        # along the batch would move half of a sharded batch to other devices.
        both = jax.tree.map(
            lambda n, c: _merge(jnp.stack([jnp.broadcast_to(n, c.shape), c], axis=1)),
            null_of(conditioning),
            conditioning,
        )
        x0 = denoiser(jnp.repeat(z, 2, axis=0), jnp.repeat(t, 2, axis=0), both)
        x0 = x0.reshape(z.shape[0], 2, *z.shape[1:])
        unconditional, conditional = x0[:, 0], x0[:, 1]
        return unconditional + scale * (conditional - unconditional), conditional

    return denoise


def nfe(scale: float) -> float:
    """Network forwards a sample that a guided call costs."""
    return 1.0 if scale == 1 else 2.0


def _merge(pairs: Array) -> Array:
    """Merges `[b, 2, ...]` into `[2b, ...]`."""
    return pairs.reshape(-1, *pairs.shape[2:])
