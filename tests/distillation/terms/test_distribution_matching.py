"""Distribution matching on Gaussians, where scores, pull and fixed point are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.support.roles import made_of, roles
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.distillation.terms.compose import at
from tlcm_jax.distillation.terms.distribution_matching import (
    DistributionMatchingSettings,
    distribution_matching,
)


def test_no_pull_at_all_where_fake_and_real_agree(world):
    """Fake = teacher and w = 1: exactly 0, to the last bit."""
    term = distribution_matching(
        roles(world), world.schedule, DistributionMatchingSettings(guidance_scale=1.0)
    )
    x = jax.random.normal(jax.random.key(0), (16, *world.shape))
    critics = {"fake": term.critics["fake"].initial(jax.random.key(0))}

    def loss(x, key):
        return term.loss(made_of(world, x), {}, world.frozen, critics, key)

    value, gradient, _ = jax.jit(lambda x, k: at(lambda x: loss(x, k), x))(x, jax.random.key(1))
    assert not np.any(value) and not np.any(gradient)


def test_the_pull_is_the_difference_of_the_scores(world):
    """Equation (2) with everything in closed form, at a single t'."""
    settings = DistributionMatchingSettings(guidance_scale=2.0, low=500, high=500)
    term = distribution_matching(roles(world), world.schedule, settings)
    x = jax.random.normal(jax.random.key(0), (8, *world.shape))
    key = jax.random.key(1)
    phi = {"shift": jnp.full(world.shape, 0.2), "spread": jnp.full(world.shape, -0.1)}

    def loss(x):
        return term.loss(made_of(world, x), {}, world.frozen, {"fake": phi}, key)

    _, found, _ = jax.jit(lambda x: at(loss, x))(x)

    t = jnp.full(8, 500)
    noise = jax.random.normal(jax.random.split(key)[1], x.shape)
    z = world.schedule.diffuse(x, noise, t)
    real = gaussian.x0(world.schedule, z, t, world.guided(8))
    data = world.conditioning(8)
    own = Gaussian(data.mean + phi["shift"], data.variance * jnp.exp(phi["spread"]))
    fake = gaussian.x0(world.schedule, z, t, own)
    size = jnp.mean(jnp.abs(x - real), axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found, (fake - real) / size / 4, rtol=1e-3, atol=1e-5)


def test_matching_carries_a_student_to_the_guided_teacher_s_distribution(world):
    """A Gaussian generator, its mean and spread free; the fake score learns beside it, 5 : 1.

    Up to t' = 500: beyond, what little a coordinate of variance 0.02 differs is lost in noise.
    """
    settings = DistributionMatchingSettings(guidance_scale=world.scale, high=500)
    term = distribution_matching(roles(world), world.schedule, settings)
    critic, data = term.critics["fake"], world.guided(64)
    # A short memory: the pull on a spread shrinks with its square.
    student, judge = (
        optax.adam(optax.cosine_decay_schedule(rate, 400 * n), b2=0.95)
        for rate, n in ((0.02, 1), (0.03, 5))
    )

    def make(theta, key):
        noise = jax.random.normal(key, (64, *world.shape))
        return theta["mean"] + jnp.exp(theta["spread"]) * noise

    def update(carry, index):
        theta, moments, phi, phi_moments = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), 12)
        for i in range(5):
            made = made_of(world, make(theta, keys[i]))
            slope = jax.grad(
                lambda phi: jnp.mean(critic.loss(phi, world.frozen, made, keys[5 + i])[0])  # noqa: B023
            )(phi)
            change, phi_moments = judge.update(slope, phi_moments)
            phi = optax.apply_updates(phi, change)

        def loss(theta):
            made = made_of(world, make(theta, keys[10]))
            return jnp.mean(term.loss(made, {}, world.frozen, {"fake": phi}, keys[11])[0])

        change, moments = student.update(jax.grad(loss)(theta), moments)
        return (optax.apply_updates(theta, change), moments, phi, phi_moments), None

    theta = {"mean": jnp.zeros(world.shape), "spread": jnp.zeros(world.shape)}
    phi = critic.initial(jax.random.key(0))
    start = (theta, student.init(theta), phi, judge.init(phi))
    (theta, *_), _ = jax.jit(lambda c: jax.lax.scan(update, c, jnp.arange(400)))(start)
    mean, spread = data.mean[0], jnp.sqrt(data.variance[0])
    # KL between the Gaussians, mean over the elements: from above 5 to next to nothing.
    ratio = jnp.exp(theta["spread"]) / spread
    kl = 0.5 * (ratio**2 + ((theta["mean"] - mean) / spread) ** 2 - 1) - jnp.log(ratio)
    begin = 0.5 * (1 / spread**2 + (mean / spread) ** 2 - 1) + jnp.log(spread)
    assert float(jnp.mean(begin)) > 5
    assert float(jnp.mean(kl)) < 0.05, kl
