"""eps, x0 and v: three names for one prediction, and the table that converts them.

With z = alpha x0 + sigma eps (schedule.py, equation 1):

    x0  = (z - sigma eps) / alpha                                                (1)
    eps = (z - alpha x0) / sigma                                                 (2)
    v   = alpha eps - sigma x0          (Salimans & Ho 2022, arXiv 2202.00512)   (3)
    x0  = alpha z - sigma v                                                      (4)
    eps = sigma z + alpha v                                                      (5)

Everything outside this file speaks of eps and x0 only: a network that predicts v is wrapped once,
by `epsilon_denoiser`, and is a `Denoiser` from there on.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from tlcm_jax.diffusion.process import NoiseSchedule

# (z, t, conditioning) -> eps. Conditioning is an opaque pytree of arrays whose leading axis is
# the batch.
Denoiser = Callable[
    [Float[Array, "b h w c"], Int[Array, " b"], PyTree[Array]], Float[Array, "b h w c"]
]


def x0_from_eps(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (1)."""
    return (z - schedule.sigma(t) * eps) / schedule.alpha(t)


def eps_from_x0(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (2)."""
    return (z - schedule.alpha(t) * x0) / schedule.sigma(t)


def v_from_eps(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (3), with x0 by (1)."""
    return schedule.alpha(t) * eps - schedule.sigma(t) * x0_from_eps(schedule, z, eps, t)


def x0_from_v(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    v: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (4)."""
    return schedule.alpha(t) * z - schedule.sigma(t) * v


def eps_from_v(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    v: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (5)."""
    return schedule.sigma(t) * z + schedule.alpha(t) * v


def predict_x0(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    conditioning: PyTree[Array],
) -> Float[Array, "b h w c"]:
    """Equation (1) of a denoiser: the consistency function f(z, t, c), without c_skip or c_out."""
    return x0_from_eps(schedule, z, denoiser(z, t, conditioning), t)


def epsilon_denoiser(schedule: NoiseSchedule, network: Denoiser) -> Denoiser:
    """Makes a `Denoiser` of a raw network, by the schedule's own prediction type.

    Args:
      schedule: says what the network returns.
      network: `(z, t, conditioning) -> eps or v`, in any float type.

    Returns:
      `(z, t, conditioning) -> eps`, float32.
    """

    def denoise(z, t, conditioning):
        prediction = network(z, t, conditioning).astype(jnp.float32)
        if schedule.prediction_type == "v_prediction":
            return eps_from_v(schedule, z, prediction, t)
        return prediction

    return denoise
