"""Gaussian data: the one teacher whose score and whose probability flow are known exactly.

For data x0 ~ N(mu, diag(S)), z_t is Gaussian too, with variance

    V_t = alpha_t^2 S + sigma_t^2,                                               (1)

and the optimal predictions are affine in z,

    E[x0 | z]  = mu + alpha_t S / V_t (z - alpha_t mu)                           (2)
    E[eps | z] = sigma_t / V_t (z - alpha_t mu).                                 (3)

The probability-flow ODE moves every coordinate's quantile, from any t to any s:

    z_s = alpha_s mu + sqrt(V_s / V_t) (z_t - alpha_t mu).                       (4)

The conditioning is (mu, S) itself, one Gaussian a sample: a class-conditional world. Where null
and conditional share S, guidance (guidance.py, equation 1) is the Gaussian about the extrapolated
mean mu_null + w (mu - mu_null), so the guided flow is known exactly as well.

These functions are the oracle of the tests, and a model to try an idea on in seconds.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlcm_jax.diffusion.prediction import Denoiser
from tlcm_jax.diffusion.process import NoiseSchedule


class Gaussian(NamedTuple):
    """A diagonal Gaussian for each sample; serves as conditioning.

    Attributes:
      mean: mu, `[b, h, w, c]`.
      variance: S, `[b, h, w, c]`, not negative.
    """

    mean: Float[Array, "b h w c"]
    variance: Float[Array, "b h w c"]


def variance_at(
    schedule: NoiseSchedule, data: Gaussian, t: Int[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Equation (1)."""
    return schedule.alpha(t) ** 2 * data.variance + schedule.sigma(t) ** 2


def x0(
    schedule: NoiseSchedule, z: Float[Array, "b h w c"], t: Int[Array, " b"], data: Gaussian
) -> Float[Array, "b h w c"]:
    """Equation (2)."""
    alpha = schedule.alpha(t)
    gain = alpha * data.variance / variance_at(schedule, data, t)
    return data.mean + gain * (z - alpha * data.mean)


def eps(
    schedule: NoiseSchedule, z: Float[Array, "b h w c"], t: Int[Array, " b"], data: Gaussian
) -> Float[Array, "b h w c"]:
    """Equation (3)."""
    gain = schedule.sigma(t) / variance_at(schedule, data, t)
    return gain * (z - schedule.alpha(t) * data.mean)


def flow(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    s: Int[Array, " b"],
    data: Gaussian,
) -> Float[Array, "b h w c"]:
    """Equation (4): the exact flow of `z` from time `t` to time `s`."""
    spread = jnp.sqrt(variance_at(schedule, data, s) / variance_at(schedule, data, t))
    return schedule.alpha(s) * data.mean + spread * (z - schedule.alpha(t) * data.mean)


def extrapolate(null: Gaussian, data: Gaussian, scale: float) -> Gaussian:
    """The Gaussian that guidance of `scale` samples, where both have `data`'s variance."""
    return Gaussian(null.mean + scale * (data.mean - null.mean), data.variance)


def denoiser(schedule: NoiseSchedule) -> Denoiser:
    """Equation (3) as a `Denoiser` whose conditioning is a `Gaussian`."""

    def denoise(z, t, conditioning):
        return eps(schedule, z, t, conditioning)

    return denoise
