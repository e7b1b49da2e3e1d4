"""The oracle: equations (1) to (4) are one another's consequence, on every process."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.noise import times
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.guidance import guided


def data_like(z):
    mean_key, variance_key = jax.random.split(jax.random.key(9))
    return Gaussian(
        jax.random.normal(mean_key, z.shape), jax.random.uniform(variance_key, z.shape) + 0.05
    )


def test_eps_and_x0_are_one_prediction(process, latents):
    z, _, t, _ = latents
    data = data_like(z)
    x0 = gaussian.x0(process, z, t, data)
    np.testing.assert_allclose(
        process.to_eps(z, x0, t), gaussian.eps(process, z, t, data), atol=1e-5
    )


def test_x0_is_the_regression_of_data_on_latents(process):
    """The best affine predictor of x0 from z, fitted to samples, is equation (2)."""
    x_key, e_key = jax.random.split(jax.random.key(0))
    shape = (200_000, 1)
    data = Gaussian(jnp.full(shape, 0.5), jnp.full(shape, 0.3))
    x0 = 0.5 + np.sqrt(0.3) * jax.random.normal(x_key, shape)
    t = times(process, np.full(shape[0], 400))
    z = process.add_noise(x0, jax.random.normal(e_key, shape), t)
    slope, intercept = np.polyfit(np.ravel(z), np.ravel(x0), 1)
    predicted = gaussian.x0(process, z, t, data)
    np.testing.assert_allclose(predicted, slope * z + intercept, atol=0.015)


def test_the_flow_composes_and_returns(process, latents):
    z, _, t, s = latents
    data = data_like(z)
    middle = (t + s) // 2 if process.discrete else (t + s) / 2
    there = gaussian.flow(process, z, t, s, data)
    via = gaussian.flow(process, gaussian.flow(process, z, t, middle, data), middle, s, data)
    np.testing.assert_allclose(via, there, atol=1e-5)
    np.testing.assert_allclose(gaussian.flow(process, there, s, t, data), z, atol=1e-4)


def test_the_flow_keeps_the_data_s_distribution(process):
    """From noise of the start's own mean and spread to the data at the end."""
    shape = (20_000, 1)
    data = Gaussian(jnp.full(shape, 0.7), jnp.full(shape, 0.2))
    t, s = times(process, np.full(shape[0], 999)), times(process, np.full(shape[0], 0))
    x0 = 0.7 + np.sqrt(0.2) * jax.random.normal(jax.random.key(0), shape)
    z = process.add_noise(x0, jax.random.normal(jax.random.key(1), shape), t)
    end = gaussian.flow(process, z, t, s, data)
    np.testing.assert_allclose(end.mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(end.var(), 0.2, rtol=0.03)


def test_the_flow_is_the_limit_of_small_steps(process, latents):
    """800 deterministic steps of the exact denoiser, from pure noise where there is one."""
    z = latents.z
    data, oracle = data_like(z), gaussian.denoiser(process)
    stops = times(process, np.arange(999, 99, -1))

    def advance(z, pair):
        t, s = (jnp.full(32, stop) for stop in pair)
        return process.step(z, oracle(z, t, data), t, s), None

    walked = jax.jit(lambda z: jax.lax.scan(advance, z, (stops[:-1], stops[1:]))[0])(z)
    ends = jnp.full(32, stops[0]), jnp.full(32, stops[-1])
    exact = gaussian.flow(process, z, *ends, data)
    np.testing.assert_allclose(walked, exact, atol=6e-3)


def test_guidance_is_the_gaussian_about_the_extrapolated_mean(process, latents):
    z, _, t, _ = latents
    variance = jnp.full(z.shape, 0.4)
    data = Gaussian(data_like(z).mean, variance)
    null = Gaussian(jnp.full((1, *z.shape[1:]), 0.2), variance[:1])
    x0 = guided(gaussian.denoiser(process), 8.0, lambda data: null)(z, t, data)
    wide = Gaussian(jnp.broadcast_to(null.mean, z.shape), variance)
    expected = gaussian.x0(process, z, t, gaussian.extrapolate(wide, data, 8.0))
    np.testing.assert_allclose(x0, expected, atol=2e-5)
