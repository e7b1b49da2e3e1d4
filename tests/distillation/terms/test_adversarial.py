"""The adversarial term against known logits, and as a game that a mean wins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.roles import made_of, roles
from tlcm_jax.distillation.networks import Role
from tlcm_jax.distillation.terms.adversarial import AdversarialSettings, adversarial


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_the_adversarial_losses_by_hand(world, loss):
    """A discriminator with a constant and a bias only: logits are known."""
    settings = AdversarialSettings(loss=loss, times=(0,))
    term = adversarial(roles(world), world.schedule, settings)
    x = jnp.full((2, *world.shape), 0.5)
    made = made_of(world, x, sample=2 * x)
    psi = {"w": jnp.full(world.shape, 0.25), "v": jnp.zeros(world.shape), "b": jnp.zeros(())}
    critic = term.critics["discriminator"]

    @jax.jit
    def both(psi, key):
        return critic.loss(psi, world.frozen, made, key), term.loss(
            made, {}, world.frozen, {"discriminator": psi}, key
        )

    (value, told), (pull, _) = both(psi, jax.random.key(0))
    # t' = 0 is all but clean: alpha_0 = 0.9996, sigma_0 = 0.029.
    real, fake = np.asarray(told["real"]), np.asarray(told["fake"])
    np.testing.assert_allclose(real, 1.0, atol=0.06)
    np.testing.assert_allclose(fake, 0.5, atol=0.06)
    if loss == "hinge":
        expected = np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)
        np.testing.assert_allclose(pull, -0.5, atol=0.06)
    else:
        expected = np.log1p(np.exp(-real)) + np.log1p(np.exp(fake))
        np.testing.assert_allclose(pull, np.log1p(np.exp(-0.5)), atol=0.03)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("level", [0, 374])
def test_noise_is_added_from_the_level_on(world, level):
    """Latents at b, noised to t', have the variance of data noised to t' at once."""
    seen = []

    def discriminator(layers):
        def network(psi, frozen):
            return lambda z, t, c: (seen.append((z, t)) or jnp.zeros((len(z), 1, 1, 1)),)

        return Role(initial=lambda key: {}, network=network)

    networks = dataclasses.replace(roles(world), discriminator=discriminator)
    term = adversarial(networks, world.schedule, AdversarialSettings(times=(250,), real="goal"))
    count = 4000
    clean = jnp.full((count, *world.shape), 0.7)
    noise = jax.random.normal(jax.random.key(0), clean.shape)
    z = world.schedule.diffuse(clean, noise, jnp.full(count, level)) if level else clean
    made = made_of(world, z, goal=z, level=level)
    term.loss(made, {}, world.frozen, {"discriminator": {}}, jax.random.key(1))
    ((found, t),) = seen
    assert np.all(np.asarray(t) == level + 250)
    alpha, sigma = world.schedule.alphas[level + 250], world.schedule.sigmas[level + 250]
    np.testing.assert_allclose(found.mean(), 0.7 * alpha, atol=0.02)
    np.testing.assert_allclose(found.std(), sigma, atol=0.02)


def test_whole_samples_are_clean_wherever_the_jump_lands(world):
    """A prediction and a real latent are held together as x0, also inside a segment."""
    seen = []

    def discriminator(layers):
        def network(psi, frozen):
            return lambda z, t, c: (seen.append((z, t)) or jnp.zeros((len(z), 1, 1, 1)),)

        return Role(initial=lambda key: {}, network=network)

    networks = dataclasses.replace(roles(world), discriminator=discriminator)
    term = adversarial(networks, world.schedule, AdversarialSettings(times=(250,)))
    clean = jnp.full((4000, *world.shape), 0.7)
    made = made_of(world, clean, sample=clean, level=374)
    term.loss(made, {}, world.frozen, {"discriminator": {}}, jax.random.key(1))
    term.critics["discriminator"].loss({}, world.frozen, made, jax.random.key(2))
    for z, t in seen:
        assert np.all(np.asarray(t) == 250)
        np.testing.assert_allclose(z.mean(), 0.7 * world.schedule.alphas[250], atol=0.02)
        np.testing.assert_allclose(z.std(), world.schedule.sigmas[250], atol=0.02)
    assert [len(z) for z, _ in seen] == [4000, 8000]


def test_the_game_carries_one_step_towards_the_sample(world):
    """A generator whose mean is off plays against a quadratic discriminator, and gets there."""
    settings = AdversarialSettings(loss="softplus", times=(10, 250))
    term = adversarial(roles(world), world.schedule, settings)
    critic = term.critics["discriminator"]
    target = jnp.asarray(world.mean)
    student, judge = optax.adam(0.02, b1=0.0), optax.adam(0.02, b1=0.0)

    def update(carry, index):
        mean, moments, psi, psi_moments = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), 5)
        noise = 0.3 * jax.random.normal(keys[0], (64, *world.shape))
        other = 0.3 * jax.random.normal(keys[1], (64, *world.shape))
        made = made_of(world, mean + noise, sample=target + other)
        slope = jax.grad(lambda p: jnp.mean(critic.loss(p, world.frozen, made, keys[2])[0]))(psi)
        # Weight decay stops the two from circling each other.
        slope = jax.tree.map(lambda g, p: g + 0.05 * p, slope, psi)
        change, psi_moments = judge.update(slope, psi_moments)
        psi = optax.apply_updates(psi, change)

        def loss(mean):
            made = made_of(world, mean + noise, sample=target + other)
            seen = {"discriminator": psi}
            return jnp.mean(term.loss(made, {}, world.frozen, seen, keys[3])[0])

        change, moments = student.update(jax.grad(loss)(mean), moments)
        return (optax.apply_updates(mean, change), moments, psi, psi_moments), mean

    mean, psi = jnp.zeros(world.shape), critic.initial(jax.random.key(0))
    start = (mean, student.init(mean), psi, judge.init(psi))
    path = jax.jit(lambda c: jax.lax.scan(update, c, jnp.arange(600))[1])(start)
    distance = jnp.sqrt(jnp.mean((path - target) ** 2, axis=(1, 2, 3)))
    assert float(distance[0]) > 0.5 and float(jnp.mean(distance[-100:])) < 0.1
