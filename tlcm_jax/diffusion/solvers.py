"""Two relatives of the deterministic step: one that keeps the noise's length, one that draws anew.

Both leave from z_t and a prediction x0, with the eps that belongs to it, for a time s <= t.

*Adjusted DDIM* (Heek et al. 2024, arXiv 2403.06807) is deterministic. The prediction is a mean
over all data that z_t may come from; DDIM takes it for the data itself, and so loses the variance
k^2 v that z_s has on account of this, with k of process.py, equation 3, and v the variance of an
element of the data given z_t. It is given back by lengthening the noise, of d elements:

    z_s = alpha_s x0 + sqrt(sigma_s^2 + k^2 v d / |eps|^2) eps.                   (1)

*Ancestral sampling* (Ho et al. 2020, arXiv 2006.11239; DDIM with eta = 1) is a first-order step of
the reverse diffusion, the way back of the noise as it was added:

    z_s = alpha_s x0 + c sigma_s eps + sqrt(1 - c^2) sigma_s xi,    xi ~ N(0, I),
    c = (alpha_t / alpha_s) (sigma_s / sigma_t).                                  (2)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.diffusion.process import Process, bcast_right


def adjusted_step(
    process: Process,
    z: Float[Array, " b *latent"],
    x0: Float[Array, " b *latent"],
    variance: Float[Array, " b"],
    t: Num[Array, " b"],
    s: Num[Array, " b"],
) -> Float[Array, " b *latent"]:
    """Equation (1), with v = `variance`; DDIM itself where that is 0."""
    _, k = process.coefficients(t, s)
    eps = process.to_eps(z, x0, t)
    size = jnp.mean(jnp.square(eps).reshape(len(z), -1), axis=1)
    missing = jnp.square(k) * variance / jnp.maximum(size, 1e-12)
    length = jnp.sqrt(jnp.square(process.sigma(s)) + missing)
    return bcast_right(process.alpha(s), z) * x0 + bcast_right(length, z) * eps


def ancestral_step(
    process: Process,
    z: Float[Array, " b *latent"],
    x0: Float[Array, " b *latent"],
    noise: Float[Array, " b *latent"],
    t: Num[Array, " b"],
    s: Num[Array, " b"],
) -> Float[Array, " b *latent"]:
    """Equation (2), with xi = `noise`; at s = t nothing moves."""
    ratio, _ = process.coefficients(t, s)
    c = ratio * jnp.where(t == s, 1.0, process.alpha(t) / process.alpha(s))
    # As in process.py: r is 1 and k 0, exactly, where no time passes.
    r = c * ratio
    k = process.alpha(s) - r * process.alpha(t)
    fresh = process.sigma(s) * jnp.sqrt(1 - jnp.square(c))
    return bcast_right(r, z) * z + bcast_right(k, z) * x0 + bcast_right(fresh, z) * noise
