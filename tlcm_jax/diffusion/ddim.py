"""DDIM: one deterministic step along the probability flow, and its solution for x0.

Song et al. 2020 (arXiv 2010.02502), with the eps implied by z_t and x0 held fixed from t to s:

    DDIM(z_t, x0, t -> s) = alpha_s x0 + (sigma_s / sigma_t) (z_t - alpha_t x0)
                          = r z_t + k x0,                                        (1)
    r = sigma_s / sigma_t,    k = alpha_s - r alpha_t.                           (2)

Given both ends, (1) can be solved for the x0 that joins them (the "inverse DDIM" of multistep
consistency models, Heek et al. 2024, arXiv 2403.06807):

    x0 = (z_s - r z_t) / k,    t != s.                                           (3)

The form r z + k x0 is used, and not the textbook one, because at t = s it gives r = 1 and k = 0
exactly: a path that has arrived stays where it is to the last bit, without a mask.
"""

from jaxtyping import Array, Float, Int

from tlcm_jax.diffusion.process import NoiseSchedule


def coefficients(
    schedule: NoiseSchedule, t: Int[Array, " b"], s: Int[Array, " b"]
) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    """The r and k of equation (2), float32."""
    r = schedule.sigma(s) / schedule.sigma(t)
    return r, schedule.alpha(s) - r * schedule.alpha(t)


def step(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    s: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (1): the latent at time `s`, from the latent `z` at time `t` and its `x0`."""
    r, k = coefficients(schedule, t, s)
    return r * z + k * x0


def inverse(
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    z_s: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    s: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Equation (3): the x0 with which DDIM takes `z` at time `t` to `z_s` at time `s != t`."""
    r, k = coefficients(schedule, t, s)
    return (z_s - r * z) / k
