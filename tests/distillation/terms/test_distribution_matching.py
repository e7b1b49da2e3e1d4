"""Distribution matching on Gaussians, where scores, gradient and fixed point are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import roles
from tests.support.gaussian_world import keys
from tests.support.noise import times as times_of
from tests.support.roles import context_of, matching, outputs_of
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import split
from tlcm_jax.distillation.terms.compose import value_and_grad_at
from tlcm_jax.distillation.terms.distribution_matching import (
    FAKE_SCORE,
    DistributionMatchingSettings,
)
from tlcm_jax.models.lora import LoRAConfig


def at(world, term, x, phi, seed=1):
    """The term's value and gradient at a prediction x."""

    @jax.jit
    def found(x, phi):
        def loss(x):
            context = context_of(world, term, len(x), aux={FAKE_SCORE: phi}, seed=seed)
            return term.loss(outputs_of(world, x), context)

        return value_and_grad_at(loss, x)[:2]

    return found(x, phi)


def test_there_is_no_gradient_at_all_where_fake_and_real_agree(any_world):
    """Fake = teacher and w = 1: exactly 0, to the last bit."""
    term = matching(any_world, DistributionMatchingSettings(guidance_scale=1.0))
    x = jax.random.normal(jax.random.key(0), (16, *any_world.shape))
    value, gradient = at(any_world, term, x, term.aux.init(jax.random.key(0)))
    assert not np.any(value) and not np.any(gradient)


def test_the_gradient_is_the_difference_of_the_scores(any_world):
    """Equation (2) with everything in closed form, at a single t'."""
    world, process = any_world, any_world.process
    term = matching(world, DistributionMatchingSettings(guidance_scale=2.0, low=500, high=500))
    x = jax.random.normal(jax.random.key(0), (8, *world.shape))
    phi = {"shift": jnp.full(world.shape, 0.2), "spread": jnp.full(world.shape, -0.1)}
    value, found = at(world, term, x, phi)

    t = times_of(process, [500] * 8)
    z = process.add_noise(x, normal(split(keys(1, 8), 2)[1], world.shape), t)
    real = gaussian.x0(process, z, t, world.guided(8))
    data = world.conditioning(8)
    own = Gaussian(data.mean + phi["shift"], data.variance * jnp.exp(phi["spread"]))
    fake = gaussian.x0(process, z, t, own)
    size = jnp.mean(jnp.abs(x - real).reshape(8, -1), axis=1)
    gradient = (fake - real) / bcast_right(size, x)
    np.testing.assert_allclose(found, gradient / 4, rtol=1e-3, atol=1e-5)  # 4 elements
    expected = 0.5 * np.mean(np.square(gradient).reshape(8, -1), axis=1)
    np.testing.assert_allclose(value, expected, rtol=1e-3)


def test_times_lie_between_low_and_high(any_world):
    """And are drawn for each sample; equation (1)."""
    world, process = any_world, any_world.process
    term = matching(world, DistributionMatchingSettings(low=100, high=300))
    x = jnp.full((3000, *world.shape), 0.7)
    z, t, noise = term._renoised(x, keys(0, 3000))
    low, high = process.time(100), process.time(300)
    share = (np.asarray(t, np.float64) - low) / (high - low)
    assert share.min() >= 0 and share.max() <= 1
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.std() - 12**-0.5) < 0.01
    np.testing.assert_allclose(z, process.add_noise(x, noise, t), atol=1e-6)
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03


def test_the_fake_score_learns_the_noise(any_world):
    """Equation (3): || eps_phi - e ||^2, least where phi is the distribution of the predictions."""
    world, process = any_world, any_world.process
    term = matching(world, DistributionMatchingSettings(low=300, high=700))
    x = world.latents(jax.random.key(0), 2000)
    right = term.aux.init(jax.random.key(0))

    @jax.jit
    def loss(phi):
        return term.aux.loss(phi, world.frozen, outputs_of(world, x), keys(2, 2000))[0]

    z, t, noise = term._renoised(x, keys(2, 2000))
    eps = gaussian.eps(process, z, t, world.conditioning(2000))
    expected = np.mean(np.square(eps - noise).reshape(2000, -1), axis=1)
    found = loss(right)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    for wrong in (
        {**right, "shift": right["shift"] + 0.3},
        {**right, "spread": right["spread"] + 1},
    ):
        assert np.mean(loss(wrong)) > 1.01 * np.mean(found)


def test_a_time_beyond_the_process_is_refused(any_world):
    networks: Networks = any_world.networks
    settings = DistributionMatchingSettings(high=1000)
    with pytest.raises(ValueError, match="high = 1000: must be at most 999"):
        settings.load(roles.model_of(any_world), networks, LoRAConfig())


def test_matching_carries_a_student_to_the_guided_teacher_s_distribution(world):
    """A Gaussian generator, its mean and spread free; the fake score learns beside it, 5 : 1.

    Up to t' = 500: beyond, what little a coordinate of variance 0.02 differs is lost in noise.
    """
    term = matching(world, DistributionMatchingSettings(guidance_scale=world.scale, high=500))
    aux, data = term.aux, world.guided(64)
    assert aux.updates == 5
    # A short memory: the gradient of a spread shrinks with its square.
    student, scorer = (
        optax.adam(optax.cosine_decay_schedule(rate, 400 * n), b2=0.95)
        for rate, n in ((0.02, 1), (0.03, 5))
    )

    def outputs(theta, key):
        noise = jax.random.normal(key, (64, *world.shape))
        return outputs_of(world, theta["mean"] + jnp.exp(theta["spread"]) * noise)

    def update(carry, index):
        theta, moments, phi, phi_moments = carry
        aux_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), index))

        def learn(carry, key):
            phi, moments = carry
            shown_key, own_key = jax.random.split(key)
            shown, own_keys = outputs(theta, shown_key), jax.random.split(own_key, 64)
            slope = jax.grad(lambda phi: jnp.mean(aux.loss(phi, world.frozen, shown, own_keys)[0]))
            change, moments = scorer.update(slope(phi), moments)
            return (optax.apply_updates(phi, change), moments), None

        (phi, phi_moments), _ = jax.lax.scan(
            learn, (phi, phi_moments), jax.random.split(aux_key, 5)
        )
        shown_key, own_key = jax.random.split(key)

        def loss(theta):
            context = context_of(world, term, 64, aux={FAKE_SCORE: phi})
            context = context._replace(keys=jax.random.split(own_key, 64))
            return jnp.mean(term.loss(outputs(theta, shown_key), context)[0])

        change, moments = student.update(jax.grad(loss)(theta), moments)
        return (optax.apply_updates(theta, change), moments, phi, phi_moments), None

    theta = {"mean": jnp.zeros(world.shape), "spread": jnp.zeros(world.shape)}
    phi = aux.init(jax.random.key(0))
    start = (theta, student.init(theta), phi, scorer.init(phi))
    (theta, *_), _ = jax.jit(lambda c: jax.lax.scan(update, c, jnp.arange(400)))(start)
    mean, spread = data.mean[0], jnp.sqrt(data.variance[0])
    # KL between the Gaussians, mean over the elements: from above 5 to next to nothing.
    ratio = jnp.exp(theta["spread"]) / spread
    kl = 0.5 * (ratio**2 + ((theta["mean"] - mean) / spread) ** 2 - 1) - jnp.log(ratio)
    begin = 0.5 * (1 / spread**2 + (mean / spread) ** 2 - 1) + jnp.log(spread)
    assert float(jnp.mean(begin)) > 5
    assert float(jnp.mean(kl)) < 0.05, kl
