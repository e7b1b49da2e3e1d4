import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.diffusion import ddim, gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.prediction import x0_from_eps


def data_like(z):
    mean_key, variance_key = jax.random.split(jax.random.key(9))
    return Gaussian(
        jax.random.normal(mean_key, z.shape), jax.random.uniform(variance_key, z.shape) + 0.05
    )


def test_eps_and_x0_are_one_prediction(schedule, latents):
    z, _, t, _ = latents
    data = data_like(z)
    eps = gaussian.eps(schedule, z, t, data)
    np.testing.assert_allclose(
        x0_from_eps(schedule, z, eps, t), gaussian.x0(schedule, z, t, data), atol=1e-5
    )


def test_x0_is_the_regression_of_data_on_latents(schedule):
    """The best affine predictor of x0 from z, fitted to samples, is equation (2)."""
    x_key, e_key = jax.random.split(jax.random.key(0))
    shape = (200_000, 1, 1, 1)
    data = Gaussian(jnp.full(shape, 0.5), jnp.full(shape, 0.3))
    x0 = 0.5 + np.sqrt(0.3) * jax.random.normal(x_key, shape)
    t = jnp.full(shape[0], 400)
    z = schedule.diffuse(x0, jax.random.normal(e_key, shape), t)
    slope, intercept = np.polyfit(np.ravel(z), np.ravel(x0), 1)
    predicted = gaussian.x0(schedule, z, t, data)
    np.testing.assert_allclose(predicted, slope * z + intercept, atol=0.01)


def test_the_flow_composes_and_returns(schedule, latents):
    z, _, t, s = latents
    data, middle = data_like(z), (t + s) // 2
    there = gaussian.flow(schedule, z, t, s, data)
    via = gaussian.flow(schedule, gaussian.flow(schedule, z, t, middle, data), middle, s, data)
    np.testing.assert_allclose(via, there, atol=1e-5)
    np.testing.assert_allclose(gaussian.flow(schedule, there, s, t, data), z, atol=1e-4)


def test_the_flow_is_the_limit_of_small_ddim_steps(schedule, latents):
    z, _, _, _ = latents
    data, t = data_like(z), jnp.full(32, 900)
    times = jnp.arange(900, 99, -1, jnp.int32)

    def advance(z, t):
        now = jnp.full(32, t)
        x0 = gaussian.x0(schedule, z, now, data)
        return ddim.step(schedule, z, x0, now, now - 1), None

    walked = jax.lax.scan(advance, z, times[:-1])[0]
    exact = gaussian.flow(schedule, z, t, jnp.full(32, 100), data)
    np.testing.assert_allclose(walked, exact, atol=5e-3)


def test_guidance_is_the_gaussian_about_the_extrapolated_mean(schedule, latents):
    z, _, t, _ = latents
    variance = jnp.full(z.shape, 0.4)
    data = Gaussian(data_like(z).mean, variance)
    null = Gaussian(jnp.full((1, *z.shape[1:]), 0.2), variance[:1])
    eps = guided(gaussian.denoiser(schedule), 8.0, null)(z, t, data)
    wide = Gaussian(jnp.broadcast_to(null.mean, z.shape), variance)
    expected = gaussian.eps(schedule, z, t, gaussian.extrapolate(wide, data, 8.0))
    np.testing.assert_allclose(eps, expected, atol=2e-5)
