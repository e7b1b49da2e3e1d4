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
from jaxtyping import Array, Float, Num

from tlcm_jax.diffusion.guidance import Denoiser
from tlcm_jax.diffusion.process import Process, bcast_right


class Gaussian(NamedTuple):
    """A diagonal Gaussian for each sample; serves as conditioning.

    Attributes:
      mean: mu, `[b, *latent]`.
      variance: S, `[b, *latent]`, not negative.
    """

    mean: Float[Array, " b *latent"]
    variance: Float[Array, " b *latent"]


def variance_at(
    process: Process, data: Gaussian, t: Num[Array, " b"]
) -> Float[Array, " b *latent"]:
    """Equation (1)."""
    alpha = bcast_right(process.alpha(t), data.mean)
    sigma = bcast_right(process.sigma(t), data.mean)
    return alpha**2 * data.variance + sigma**2


def x0(
    process: Process, z: Float[Array, " b *latent"], t: Num[Array, " b"], data: Gaussian
) -> Float[Array, " b *latent"]:
    """Equation (2)."""
    alpha = bcast_right(process.alpha(t), z)
    gain = alpha * data.variance / variance_at(process, data, t)
    return data.mean + gain * (z - alpha * data.mean)


def eps(
    process: Process, z: Float[Array, " b *latent"], t: Num[Array, " b"], data: Gaussian
) -> Float[Array, " b *latent"]:
    """Equation (3)."""
    gain = bcast_right(process.sigma(t), z) / variance_at(process, data, t)
    return gain * (z - bcast_right(process.alpha(t), z) * data.mean)


def flow(
    process: Process,
    z: Float[Array, " b *latent"],
    t: Num[Array, " b"],
    s: Num[Array, " b"],
    data: Gaussian,
) -> Float[Array, " b *latent"]:
    """Equation (4): the exact flow of `z` from time `t` to time `s`."""
    spread = jnp.sqrt(variance_at(process, data, s) / variance_at(process, data, t))
    centred = z - bcast_right(process.alpha(t), z) * data.mean
    return bcast_right(process.alpha(s), z) * data.mean + spread * centred


def extrapolate(null: Gaussian, data: Gaussian, scale: float) -> Gaussian:
    """The Gaussian that guidance of `scale` samples, where both have `data`'s variance."""
    return Gaussian(null.mean + scale * (data.mean - null.mean), data.variance)


def denoiser(process: Process) -> Denoiser:
    """Equation (2) as a `Denoiser` whose conditioning is a `Gaussian`."""

    def denoise(z, t, conditioning):
        return x0(process, z, t, conditioning)

    return denoise
