"""Equations (1) to (4), on processes of both kinds and on latents of several ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.noise import PROCESSES, times
from tlcm_jax.diffusion.process import DiscreteVP, RectifiedFlow


def network(process, x0, eps, t):
    """What a perfect network of the process's own prediction type returns."""
    shaped = (-1, *(1,) * (x0.ndim - 1))
    alpha, sigma = process.alpha(t).reshape(shaped), process.sigma(t).reshape(shaped)
    if isinstance(process, RectifiedFlow):
        return eps - x0
    return eps if process.prediction_type == "epsilon" else alpha * eps - sigma * x0


def test_a_raw_prediction_becomes_x0_and_x0_the_noise(process, latents):
    eps, x0, t, _ = latents
    z = process.add_noise(x0, eps, t)
    found = process.to_x0(network(process, x0, eps, t), z, t)
    # Dividing by alpha (0.07 at the noisy end) magnifies an eps network's rounding.
    np.testing.assert_allclose(found, x0, atol=1e-5)
    np.testing.assert_allclose(process.to_eps(z, found, t), eps, atol=2e-5)


def test_the_raw_prediction_of_an_x0_is_a_perfect_network_s(process, latents):
    eps, x0, t, _ = latents
    z = process.add_noise(x0, eps, t)
    # Dividing by sigma (0.03 at the clean end) magnifies z's rounding.
    np.testing.assert_allclose(process.from_x0(x0, z, t), network(process, x0, eps, t), atol=2e-5)


def test_an_x0_network_predicts_x0(latents):
    process = DiscreteVP(np.linspace(0.99, 0.01, 1000, dtype=np.float32), "sample")
    z, x0, t = latents.z, latents.x0, jnp.full(len(latents.z), 500)
    np.testing.assert_array_equal(process.from_x0(x0, z, t), x0)
    np.testing.assert_array_equal(process.to_x0(x0, z, t), x0)


def test_x0_and_its_noise_are_one_prediction(process, latents):
    """Any x0, not the latent's own: adding the noise it implies gives the latent again."""
    z, x0, t, _ = latents
    np.testing.assert_allclose(process.add_noise(x0, process.to_eps(z, x0, t), t), z, atol=2e-6)


def test_a_half_precision_network_is_raised_to_float32(process, latents):
    assert process.to_x0(latents.z.astype(jnp.bfloat16), *latents[::2]).dtype == jnp.float32


def test_the_noise_of_clean_data_is_none():
    z = jnp.ones((2, 3))
    clean = RectifiedFlow().to_eps(z, 2 * z, jnp.array([0.0, 0.5]))
    np.testing.assert_array_equal(clean, [[0, 0, 0], [0, 0, 0]])


def test_data_with_noise_has_the_level_s_mean_and_spread(process):
    x0 = jnp.full((1, 64, 64, 4), 2.0)
    t = times(process, [600])
    z = process.add_noise(x0, jax.random.normal(jax.random.key(0), x0.shape), t)
    np.testing.assert_allclose(z.mean(), 2 * process.alpha(t)[0], atol=0.02)
    np.testing.assert_allclose(z.std(), process.sigma(t)[0], rtol=0.02)


def test_a_step_to_the_same_time_changes_no_bit(process, latents):
    every = times(process, np.arange(1000))
    r, k = jax.jit(lambda t: process.coefficients(t, t))(every)
    assert jnp.all(r == 1) and jnp.all(k == 0)
    z, x0, t, _ = latents
    np.testing.assert_array_equal(process.step(z, x0, t, t), z)


def test_a_step_keeps_the_noise_and_moves_the_level(process, latents):
    """The textbook form: alpha_s x0 + sigma_s eps, with eps from z = alpha_t x0 + sigma_t eps."""
    eps, x0, t, s = latents
    z_t, z_s = process.add_noise(x0, eps, t), process.add_noise(x0, eps, s)
    np.testing.assert_allclose(process.step(z_t, x0, t, s), z_s, atol=2e-6)


def test_a_step_on_a_straight_flow_is_euler_s(latents, process):
    if process.discrete:
        pytest.skip("Euler's step is a flow's; a diffusion's is in the test above")
    z, x0, t, s = latents
    velocity = process.to_eps(z, x0, t) - x0
    expected = z + (s - t).reshape(-1, *(1,) * (z.ndim - 1)) * velocity
    np.testing.assert_allclose(process.step(z, x0, t, s), expected, atol=3e-6)


def test_the_step_back_undoes_a_step(process, latents):
    z, x0, t, s = latents
    there = process.step(z, x0, t, s)
    # On the way back sigma_t / sigma_s magnifies rounding.
    scale = float(jnp.max(process.sigma(t) / process.sigma(s)))
    np.testing.assert_allclose(process.step(there, x0, s, t), z, atol=4e-6 * scale)


def test_the_inverse_finds_the_x0_of_a_step(process, latents):
    z, x0, t, s = latents
    there = process.step(z, x0, t, s)
    _, k = process.coefficients(t, s)
    scale = float(jnp.max(1 / jnp.abs(k)))  # it divides by k
    np.testing.assert_allclose(process.inverse_step(z, there, t, s), x0, atol=2e-6 * scale)


def test_two_steps_with_one_x0_are_one(process, latents):
    z, x0, t, s = latents
    middle = (t + s) // 2 if process.discrete else (t + s) / 2
    halfway = process.step(z, x0, t, middle)
    np.testing.assert_allclose(
        process.step(halfway, x0, middle, s), process.step(z, x0, t, s), atol=3e-6
    )


def test_from_pure_noise_a_step_needs_no_trace_of_the_data():
    """At zero terminal SNR, alpha = 0: the latent is the noise, whatever x0 is said to be."""
    for name in ("v-zero-snr", "flow"):
        process = PROCESSES[name]
        t, s = times(process, [999, 999]), times(process, [400, 999])
        assert process.alpha(t)[0] == 0 and process.sigma(t)[0] == 1
        z, x0 = jnp.full((2, 3), 0.6), jnp.full((2, 3), 5.0)
        np.testing.assert_array_equal(process.to_eps(z, x0, t), z)
        found = process.step(z, x0, t, s)
        expected = process.alpha(s)[0] * 5 + process.sigma(s)[0] * 0.6
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)
        np.testing.assert_array_equal(found[1], z[1])


def test_levels_are_gathered_by_sample_inside_jit(sd):
    t = jnp.array([0, 499, 999])
    alpha, sigma = jax.jit(lambda t: (sd.alpha(t), sd.sigma(t)))(t)
    assert alpha.shape == (3,)
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_array_equal(alpha, sd.alphas[[0, 499, 999]])
    np.testing.assert_array_equal(sigma, sd.sigmas[[0, 499, 999]])


def test_signal_to_noise(process):
    t = times(process, [1, 500, 999])
    alpha, sigma = np.asarray(process.alpha(t), float), np.asarray(process.sigma(t), float)
    np.testing.assert_allclose(process.snr(t), alpha**2 / sigma**2, rtol=1e-5)
    assert np.all(np.diff(process.snr(t)) < 0)


def test_equal_processes_are_equal_and_hash_alike():
    again = DiscreteVP(PROCESSES["v"].alphas_cumprod.copy(), "v_prediction")
    assert again == PROCESSES["v"] and hash(again) == hash(PROCESSES["v"])
    assert RectifiedFlow(3.0) == PROCESSES["flow-shift-3"]
    assert len(set(PROCESSES.values())) == len(PROCESSES)


def test_tables_that_are_no_diffusion_are_refused():
    table = np.array([0.9, 0.5, 0.0], np.float32)
    DiscreteVP(table, "v_prediction")
    with pytest.raises(ValueError, match="alphas_cumprod ends at 0.*must be 'v_prediction'"):
        DiscreteVP(table)
    with pytest.raises(ValueError, match="must fall strictly"):
        DiscreteVP(table[::-1], "v_prediction")
    with pytest.raises(ValueError, match="prediction_type = 'flow'.*v_prediction or sample"):
        DiscreteVP(table, "flow")
    with pytest.raises(ValueError, match="shift = 0.0"):
        RectifiedFlow(0.0)
    with pytest.raises(ValueError, match="num_train_timesteps = 1"):
        RectifiedFlow(num_train_timesteps=1)


# --- time ---


def test_training_steps_of_a_flow_are_shifted_and_span_0_to_1():
    """Esser et al. 2024, equation 23: the noise-to-signal ratio is multiplied by the shift."""
    plain, shifted = PROCESSES["flow"], PROCESSES["flow-shift-3"]
    assert (plain.start, plain.end) == (shifted.start, shifted.end) == (1, 0)
    for step in (1, 250, 500, 998):
        u, t = plain.time(step), shifted.time(step)
        assert u == step / 999
        assert t / (1 - t) == pytest.approx(3 * u / (1 - u))


def test_a_grid_begins_at_the_start_and_ends_before_the_end(process):
    assert process.grid(4) == tuple(process.time(i) for i in (999, 749, 499, 249))
    assert process.grid(4, "leading") == tuple(process.time(i) for i in (751, 501, 251, 1))
    assert process.grid(25)[:2] == (process.start, process.time(959))
    assert len(process.grid(30)) == 30
    with pytest.raises(ValueError, match="spacing = 'linspace'.*'trailing' and 'leading'"):
        process.grid(4, "linspace")
    for steps in (0, 1000):
        with pytest.raises(ValueError, match=f"steps = {steps}"):
            process.grid(steps)


def test_earlier_counts_in_training_steps_and_stops_at_the_end(process):
    t = times(process, [999, 500, 40, 3])
    found = process.earlier(t, 40)
    assert found.dtype == process.time_dtype
    np.testing.assert_allclose(found, times(process, [959, 460, 0, 0]), atol=1e-6)
