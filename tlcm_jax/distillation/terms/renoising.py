"""Noise on latents that are noisy already, up to a later level.

A latent z_b at time b, diffused on to t' >= b by fresh noise e:

    z_t' = c z_b + sqrt(sigma_t'^2 - c^2 sigma_b^2) e,   c = alpha_t' / alpha_b.             (1)

The process's end counts as clean data: (1) with alpha_b = 1, sigma_b = 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.diffusion.process import Process, bcast_right


def diffused(
    process: Process,
    z: Float[Array, " n *latent"],
    level: Num[Array, " n"],
    t: Num[Array, " n"],
    noise: Float[Array, " n *latent"],
) -> Float[Array, " n *latent"]:
    """Equation (1).

    Args:
      process: of the latents.
      z: latents at `level`.
      level: b.
      t: t', none below its level.
      noise: e, unit Gaussian.
    """
    clean = level == process.end
    c = process.alpha(t) / jnp.where(clean, 1.0, process.alpha(level))
    kept = c * jnp.where(clean, 0.0, process.sigma(level))
    # Where t' is the level nothing is added, and rounding must not make a root of it.
    fresh = jnp.sqrt(jnp.maximum(jnp.square(process.sigma(t)) - jnp.square(kept), 0))
    return bcast_right(c, z) * z + bcast_right(fresh, z) * noise
