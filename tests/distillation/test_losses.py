"""Each loss against numpy, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.distillation import losses

SHAPES = [(5,), (5, 3), (5, 2, 3, 4)]


def latents(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rows(x):
    """One row a sample, float64."""
    return np.asarray(x, np.float64).reshape(len(x), -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_of_latents_of_any_rank(shape):
    a, b = latents(shape), latents(shape, 1)
    error = rows(a - b)
    np.testing.assert_allclose(losses.mean_per_sample(a), rows(a).mean(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        losses.norm_per_sample(a), np.linalg.norm(rows(a), axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(losses.mse(a, b), (error**2).mean(1), rtol=1e-5)
    for c in (0.001, 1.0):
        expected = (np.sqrt(error**2 + c**2) - c).mean(1)
        np.testing.assert_allclose(losses.pseudo_huber(a, b, c), expected, rtol=1e-5)


def test_the_pseudo_huber_distance_is_square_below_c_and_linear_above():
    zero = jnp.zeros((1, 1))
    np.testing.assert_allclose(losses.pseudo_huber(zero + 0.01, zero, 1.0), 0.01**2 / 2, rtol=1e-3)
    np.testing.assert_allclose(losses.pseudo_huber(zero + 100, zero, 1.0), 99.005, rtol=1e-6)


def test_the_snr_weight_is_clipped():
    snr = jnp.array([0.0, 0.5, 3.9, 4.0, 100.0, jnp.inf])
    np.testing.assert_allclose(losses.min_snr_weight(snr, 5.0), [1, 1.5, 4.9, 5, 5, 5], rtol=1e-6)
    np.testing.assert_array_equal(losses.min_snr_weight(snr, 1.0), 1)


def test_preference_asks_for_the_threshold_and_against_other_prompts():
    score = jnp.array([0.2, 1.5, 0.2, 0.2])
    negative = jnp.array([-1.0, 0.4, 0.4, 0.4])
    mismatched = jnp.array([True, True, True, False])
    found = losses.preference(score, negative, 1.0, mismatched)
    np.testing.assert_allclose(found, [0.8, 0.4, 1.2, 0.8], rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distribution_matching_gradient(shape):
    x, real, fake = (latents(shape, seed) for seed in range(3))
    size = np.abs(rows(x - real)).mean(1).reshape(-1, *[1] * (len(shape) - 1))
    found = losses.distribution_matching_grad(x, real, fake)
    np.testing.assert_allclose(found, (fake - real) / size, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.distribution_matching_grad(x, real, real), 0)
    # A student that already sits where the teacher points is divided by no zero.
    assert np.all(np.isfinite(losses.distribution_matching_grad(x, x, fake)))


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_adversarial_losses_over_maps_of_any_size(kind):
    """The mean over a map's places first, then over the maps: a large map has no more say."""
    real, fake = (
        [3 * latents((5, 2, 2, 1), seed), 3 * latents((5, 4, 4, 1), seed + 1)] for seed in (0, 2)
    )

    def mean(maps, function):
        return np.mean([function(rows(m)).mean(1) for m in maps], axis=0)

    on_real, on_fake, of_student = {
        "hinge": (lambda s: np.maximum(1 - s, 0), lambda s: np.maximum(1 + s, 0), lambda s: -s),
        "softplus": (
            lambda s: np.log1p(np.exp(-s)),
            lambda s: np.log1p(np.exp(s)),
            lambda s: np.log1p(np.exp(-s)),
        ),
    }[kind]
    found = losses.discriminator_loss(real, fake, kind)
    np.testing.assert_allclose(found, mean(real, on_real) + mean(fake, on_fake), rtol=1e-5)
    np.testing.assert_allclose(
        losses.generator_loss(fake, kind), mean(fake, of_student), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        losses.mean_logit(fake, lambda s: s), mean(fake, lambda s: s), rtol=1e-5, atol=1e-6
    )


def test_logits_are_averaged_in_float32():
    maps = [jnp.full((1, 4096), 1.0, jnp.bfloat16).at[0, 0].set(-4095.0)]
    found = losses.mean_logit(maps, lambda s: s)
    assert found.dtype == jnp.float32
    exact = np.asarray(maps[0], np.float64).mean()
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_gradients_are_the_distances_own():
    """A loss that stopped a gradient would be 0 here."""
    a, b = jnp.asarray(latents((3, 2))), jnp.asarray(latents((3, 2), 1))
    slope = jax.grad(lambda a: jnp.sum(losses.mse(a, b)))(a)
    np.testing.assert_allclose(slope, a - b, rtol=1e-5)  # 2 / 2 elements
    slope = jax.grad(lambda a: jnp.sum(losses.pseudo_huber(a, b, 0.1)))(a)
    np.testing.assert_allclose(slope, (a - b) / np.sqrt((a - b) ** 2 + 0.01) / 2, rtol=1e-5)
