import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.diffusion import ddim


def test_a_step_to_the_same_time_changes_no_bit(schedule, latents):
    z, x0, _, _ = latents
    every = jnp.arange(1000)
    r, k = jax.jit(lambda t: ddim.coefficients(schedule, t, t))(every)
    assert jnp.all(r == 1) and jnp.all(k == 0)
    np.testing.assert_array_equal(ddim.step(schedule, z, x0, latents.t, latents.t), z)


def test_a_step_keeps_the_noise_and_moves_the_level(schedule, latents):
    """The textbook form: alpha_s x0 + sigma_s eps, with eps from z = alpha_t x0 + sigma_t eps."""
    eps, x0, t, s = latents
    z_t, z_s = schedule.diffuse(x0, eps, t), schedule.diffuse(x0, eps, s)
    np.testing.assert_allclose(ddim.step(schedule, z_t, x0, t, s), z_s, atol=2e-6)


def test_the_step_back_undoes_a_step(schedule, latents):
    z, x0, t, s = latents
    there = ddim.step(schedule, z, x0, t, s)
    # On the way back sigma_t / sigma_s (up to 30) magnifies rounding.
    np.testing.assert_allclose(ddim.step(schedule, there, x0, s, t), z, atol=1e-4)


def test_the_inverse_finds_the_x0_of_a_step(schedule, latents):
    z, x0, t, s = latents
    there = ddim.step(schedule, z, x0, t, s)
    np.testing.assert_allclose(ddim.inverse(schedule, z, there, t, s), x0, atol=2e-5)


def test_two_steps_with_one_x0_are_one(schedule, latents):
    z, x0, t, s = latents
    middle = (t + s) // 2
    halfway = ddim.step(schedule, z, x0, t, middle)
    np.testing.assert_allclose(
        ddim.step(schedule, halfway, x0, middle, s), ddim.step(schedule, z, x0, t, s), atol=2e-6
    )
