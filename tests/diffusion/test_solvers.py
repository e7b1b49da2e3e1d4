import jax
import jax.numpy as jnp
import numpy as np

from tests.support.noise import times
from tlcm_jax.diffusion import gaussian, solvers
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.process import bcast_right


def mean(x):
    """Over all but the batch."""
    return jnp.mean(x.reshape(len(x), -1), axis=1)


def test_without_variance_the_adjusted_step_is_ddim(process, latents):
    z, x0, t, s = latents
    found = solvers.adjusted_step(process, z, x0, jnp.zeros(len(t)), t, s)
    np.testing.assert_allclose(found, process.step(z, x0, t, s), atol=1e-5)


def test_the_adjusted_step_gives_the_noise_the_variance_that_is_missing(process, latents):
    z, x0, t, s = latents
    variance = jnp.linspace(0.1, 2, len(t))
    found = solvers.adjusted_step(process, z, x0, variance, t, s)
    noise = found - bcast_right(process.alpha(s), z) * x0
    _, k = process.coefficients(t, s)
    eps = process.to_eps(z, x0, t)
    wanted = mean((bcast_right(process.sigma(s), z) * eps) ** 2) + k**2 * variance
    np.testing.assert_allclose(mean(noise**2), wanted, rtol=1e-4)
    assert np.all(mean(noise * eps) > 0)


def test_the_adjusted_step_keeps_the_variance_of_gaussian_data(sd):
    """From much noise, with the exact posterior variance; DDIM loses a part of it.

    Of data N(0, I) the prediction is alpha z and the noise sigma z, so that both steps scale z, by
    known factors. (Near the data they are as long as each other, and no longer add up as squares.)
    """
    data = Gaussian(jnp.zeros((4, 8, 8, 4)), jnp.ones((4, 8, 8, 4)))
    for high, low in ((999, 600), (900, 600), (800, 600)):
        t, s = jnp.full(4, high), jnp.full(4, low)
        z = jax.random.normal(jax.random.key(high), data.mean.shape)
        z /= jnp.sqrt(jnp.mean(z**2, (1, 2, 3), keepdims=True))  # alpha^2 + sigma^2 = 1
        x0 = gaussian.x0(sd, z, t, data)
        posterior = sd.sigma(t) ** 2  # S sigma^2 / V
        found = solvers.adjusted_step(sd, z, x0, posterior, t, s)

        alpha, sigma = (np.asarray(x, np.float64) for x in (sd.alphas, sd.sigmas))
        lost = alpha[low] - sigma[low] / sigma[high] * alpha[high]
        plain = alpha[low] * alpha[high] + sigma[low] * sigma[high]
        kept = alpha[low] * alpha[high] + sigma[high] * np.hypot(sigma[low], lost)
        np.testing.assert_allclose(sd.step(z, x0, t, s), plain * z, rtol=1e-5)
        np.testing.assert_allclose(found, kept * z, rtol=1e-5)
        assert plain < 0.98 and abs(kept - 1) < 0.1 * (1 - plain), (high, plain, kept)


def test_an_ancestral_step_is_the_way_back_of_the_noise(process):
    """With the data itself as x0: z_s and z_t are jointly as if noise had been added s to t."""
    count = 80_000
    keys = jax.random.split(jax.random.key(0), 2)
    x0 = jnp.full((count, 1), 0.7)
    t, s = times(process, np.full(count, 620)), times(process, np.full(count, 480))
    z_t = process.add_noise(x0, jax.random.normal(keys[0], x0.shape), t)
    fresh = jax.random.normal(keys[1], x0.shape)
    z_s = solvers.ancestral_step(process, z_t, x0, fresh, t, s)
    (alpha_t, alpha_s), sigma_s = (process.alpha(u)[0] for u in (t, s)), process.sigma(s)[0]
    np.testing.assert_allclose(z_s.mean(), 0.7 * alpha_s, atol=0.01)
    np.testing.assert_allclose(z_s.std(), sigma_s, rtol=0.01)
    together = jnp.mean((z_s - alpha_s * x0) * (z_t - alpha_t * x0))
    np.testing.assert_allclose(together, alpha_t / alpha_s * sigma_s**2, rtol=0.02)


def test_an_ancestral_step_to_the_same_time_changes_no_bit(process, latents):
    z, x0, t, _ = latents
    fresh = jax.random.normal(jax.random.key(0), z.shape)
    np.testing.assert_array_equal(solvers.ancestral_step(process, z, x0, fresh, t, t), z)
    end = times(process, np.zeros(len(t)))
    np.testing.assert_array_equal(solvers.ancestral_step(process, z, x0, fresh, end, end), z)
