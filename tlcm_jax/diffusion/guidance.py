"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    eps_w(z, t, c) = eps(z, t, null) + w (eps(z, t, c) - eps(z, t, null))        (1)

w = 1 is the conditional model itself, and is called as such; TLCM's teacher has w = 8, fixed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from tlcm_jax.diffusion.prediction import Denoiser


def guided(denoiser: Denoiser, scale: float, null: PyTree[Array]) -> Denoiser:
    """Equation (1) as a `Denoiser`: one call of `denoiser`, on a batch of 2b (of b if w = 1).

    Args:
      denoiser: the network without guidance.
      scale: w.
      null: the unconditional conditioning; the structure of the conditional one, with a leading
        axis of 1.

    Returns:
      A denoiser for a batch of b, whose eps is float32.
    """
    both = guided_and_plain(denoiser, scale, null)
    return lambda z, t, conditioning: both(z, t, conditioning)[0]


def guided_and_plain(denoiser: Denoiser, scale: float, null: PyTree[Array]) -> Callable:
    """As `guided`, but tells eps_w and, from the same call, the conditional model's own eps."""
    if scale == 1:

        def plain(z, t, conditioning):
            eps = denoiser(z, t, conditioning).astype(jnp.float32)
            return eps, eps

        return plain

    def denoise(z, t, conditioning):
        # Null and conditional lie side by side, sample by sample: merging the new axis *under*
        # the batch axis keeps every sample on the device that holds it, where a concatenation
        # along the batch would move half of a sharded batch to other devices.
        both = jax.tree.map(
            lambda n, c: _merge(jnp.stack([jnp.broadcast_to(n, c.shape), c], axis=1)),
            null,
            conditioning,
        )
        eps = denoiser(jnp.repeat(z, 2, axis=0), jnp.repeat(t, 2, axis=0), both)
        eps = eps.astype(jnp.float32).reshape(z.shape[0], 2, *z.shape[1:])
        unconditional, conditional = eps[:, 0], eps[:, 1]
        return unconditional + scale * (conditional - unconditional), conditional

    return denoise


def forwards(scale: float) -> float:
    """Network forwards a sample that a guided call costs."""
    return 1.0 if scale == 1 else 2.0


def _merge(pairs: Array) -> Array:
    """Merges `[b, 2, ...]` into `[2b, ...]`."""
    return pairs.reshape(-1, *pairs.shape[2:])
