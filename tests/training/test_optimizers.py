"""The optimiser: its rates, its clip, and the settings it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.training.optimizers import adamw, learning_rate_schedule


def rates(count, **settings):
    schedule = learning_rate_schedule(2.0, **settings)
    return np.array([float(schedule(i)) for i in range(count)])


def test_warm_up_rises_linearly_from_the_first_update_then_stays():
    np.testing.assert_allclose(rates(6, warmup_updates=4), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(rates(3, warmup_updates=1), 2.0)
    np.testing.assert_allclose(rates(3), 2.0)


def test_decays_end_at_their_fraction():
    linear = rates(12, warmup_updates=2, decay="linear", total_updates=10, final_fraction=0.5)
    np.testing.assert_allclose(linear[2:], [*np.linspace(2, 1, 9), 1.0])
    cosine = rates(12, warmup_updates=2, decay="cosine", total_updates=10, final_fraction=0.1)
    ramp = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose(cosine[2:11], 2 * ramp, rtol=1e-6)
    assert cosine[11] == pytest.approx(0.2)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="unknown decay 'step'.*'constant'"):
        learning_rate_schedule(1.0, decay="step")
    with pytest.raises(ValueError, match="more updates in all than the 10 of the warm-up, got 5"):
        learning_rate_schedule(1.0, decay="cosine", warmup_updates=10, total_updates=5)
    with pytest.raises(ValueError, match="must be positive"):
        adamw(0.0)


def test_large_gradients_are_scaled_to_the_clip_and_small_ones_are_not():
    # Adam's first moment after one update is (1 - b1) times the gradient it was given.
    for size, given in ((30.0, 1.0), (0.3, 0.3)):
        optimizer = adamw(1e-3, max_grad_norm=1.0)
        params = {"a": jnp.zeros(2)}
        direction = jnp.array([0.6, 0.8])
        _, state = optimizer.update({"a": size * direction}, optimizer.init(params), params)
        np.testing.assert_allclose(state[1][0].mu["a"], 0.1 * given * direction, rtol=1e-5)
