import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.diffusion import ddim, gaussian, solvers
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.prediction import eps_from_x0


def test_without_variance_the_adjusted_step_is_ddim(schedule, latents):
    z, x0, t, s = latents
    none = jnp.zeros(len(t))
    found = solvers.adjusted_step(schedule, z, x0, none, t, s)
    np.testing.assert_allclose(found, ddim.step(schedule, z, x0, t, s), atol=1e-5)


def test_the_adjusted_step_gives_the_noise_the_variance_that_is_missing(schedule, latents):
    z, x0, t, s = latents
    variance = jnp.linspace(0.1, 2, len(t))
    found = solvers.adjusted_step(schedule, z, x0, variance, t, s)
    noise = found - schedule.alpha(s) * x0
    _, k = ddim.coefficients(schedule, t, s)
    eps = eps_from_x0(schedule, z, x0, t)
    wanted = jnp.mean((schedule.sigma(s) * eps) ** 2, (1, 2, 3)) + k[:, 0, 0, 0] ** 2 * variance
    np.testing.assert_allclose(jnp.mean(noise**2, (1, 2, 3)), wanted, rtol=1e-4)
    assert np.all(jnp.sum(noise * eps, (1, 2, 3)) > 0)


def test_the_adjusted_step_keeps_the_variance_of_gaussian_data(schedule):
    """From much noise, with the exact posterior variance; DDIM loses a part of it.

    Of data N(0, I) the prediction is alpha z and the noise sigma z, so that both steps scale z, by
    known factors. (Near the data they are as long as each other, and no longer add up as squares.)
    """
    data = Gaussian(jnp.zeros((4, 8, 8, 4)), jnp.ones((4, 8, 8, 4)))
    for high, low in ((999, 600), (900, 600), (800, 600)):
        t, s = jnp.full(4, high), jnp.full(4, low)
        z = jax.random.normal(jax.random.key(high), data.mean.shape)
        z /= jnp.sqrt(jnp.mean(z**2, (1, 2, 3), keepdims=True))  # alpha^2 + sigma^2 = 1
        x0 = gaussian.x0(schedule, z, t, data)
        posterior = schedule.sigma(t)[:, 0, 0, 0] ** 2  # S sigma^2 / V
        found = solvers.adjusted_step(schedule, z, x0, posterior, t, s)

        alpha, sigma = (np.asarray(x, np.float64) for x in (schedule.alphas, schedule.sigmas))
        lost = alpha[low] - sigma[low] / sigma[high] * alpha[high]
        plain = alpha[low] * alpha[high] + sigma[low] * sigma[high]
        kept = alpha[low] * alpha[high] + sigma[high] * np.hypot(sigma[low], lost)
        np.testing.assert_allclose(ddim.step(schedule, z, x0, t, s), plain * z, rtol=1e-5)
        np.testing.assert_allclose(found, kept * z, rtol=1e-5)
        assert plain < 0.98 and abs(kept - 1) < 0.1 * (1 - plain), (high, plain, kept)


def test_an_ancestral_step_is_the_way_back_of_the_noise(schedule):
    """With the data itself as x0: z_s and z_t are jointly as if noise had been added s to t."""
    count = 20000
    keys = jax.random.split(jax.random.key(0), 2)
    x0 = jnp.full((count, 2, 2, 1), 0.7)
    t, s = jnp.full(count, 620), jnp.full(count, 480)
    z_t = schedule.diffuse(x0, jax.random.normal(keys[0], x0.shape), t)
    fresh = jax.random.normal(keys[1], x0.shape)
    z_s = solvers.ancestral_step(schedule, z_t, x0, fresh, t, s)
    alpha, sigma = schedule.alphas, schedule.sigmas
    np.testing.assert_allclose(z_s.mean(), 0.7 * alpha[480], atol=0.01)
    np.testing.assert_allclose(z_s.std(), sigma[480], rtol=0.01)
    together = jnp.mean((z_s - alpha[480] * x0) * (z_t - alpha[620] * x0))
    np.testing.assert_allclose(together, alpha[620] / alpha[480] * sigma[480] ** 2, rtol=0.02)


def test_an_ancestral_step_to_the_same_time_changes_no_bit(schedule, latents):
    z, x0, t, _ = latents
    fresh = jax.random.normal(jax.random.key(0), z.shape)
    np.testing.assert_array_equal(solvers.ancestral_step(schedule, z, x0, fresh, t, t), z)
