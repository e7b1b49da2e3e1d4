"""Two relatives of the DDIM step (ddim.py): one that keeps the noise's length, one that draws anew.

Both leave from z_t, a prediction x0 and the eps that belongs to it, for a time s <= t.

*Adjusted DDIM* (Heek et al. 2024, arXiv 2403.06807) is deterministic. The prediction is a mean
over all data that z_t may come from; DDIM takes it for the data itself, and so loses the variance
k^2 v that z_s has on account of this, with k of ddim.py, equation 2, and v the variance of an
element of the data given z_t. It is given back by lengthening the noise, of d elements:

    z_s = alpha_s x0 + sqrt(sigma_s^2 + k^2 v d / |eps|^2) eps.                   (1)

*Ancestral sampling* (Ho et al. 2020, arXiv 2006.11239; DDIM with eta = 1) is a first-order step of
the reverse diffusion, the way back of the noise as it was added:

    z_s = alpha_s x0 + sqrt(sigma_s^2 - n^2) eps + n xi,    xi ~ N(0, I),
    n^2 = (sigma_s / sigma_t)^2 (1 - (alpha_t / alpha_s)^2).                      (2)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlcm_jax.diffusion import ddim
from tlcm_jax.diffusion.prediction import eps_from_x0
from tlcm_jax.diffusion.process import NoiseSchedule, broadcast


def adjusted_step(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    variance: Float[Array, " b"],
    t: Int[Array, " b"],
    s: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (1), with v = `variance`; DDIM itself where that is 0."""
    _, k = ddim.coefficients(schedule, t, s)
    eps = eps_from_x0(schedule, z, x0, t)
    size = jnp.mean(jnp.square(eps), axis=(1, 2, 3), keepdims=True)
    missing = jnp.square(k) * broadcast(variance) / jnp.maximum(size, 1e-12)
    return schedule.alpha(s) * x0 + jnp.sqrt(jnp.square(schedule.sigma(s)) + missing) * eps


def ancestral_step(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    s: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (2), with xi = `noise`; at s = t nothing moves."""
    ratio = schedule.alpha(t) / schedule.alpha(s)
    share = (1 - jnp.square(ratio)) / jnp.square(schedule.sigma(t))  # of sigma_s^2 that is fresh
    # As in ddim.py: r is 1 and k 0, exactly, where no time passes.
    r = schedule.sigma(s) / schedule.sigma(t) * jnp.sqrt(1 - share)
    k = schedule.alpha(s) - r * schedule.alpha(t)
    return r * z + k * x0 + schedule.sigma(s) * jnp.sqrt(share) * noise
