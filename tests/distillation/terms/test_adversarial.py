"""The adversarial term against known logits, and as adversarial training of a mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import roles
from tests.support.gaussian_world import keys
from tests.support.noise import times as times_of
from tests.support.roles import adversarial, context_of, outputs_of
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.distillation.objective import split
from tlcm_jax.distillation.terms.adversarial import DISCRIMINATOR, AdversarialSettings
from tlcm_jax.models.lora import LoRAConfig


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_the_adversarial_losses_by_hand(any_world, loss):
    """A discriminator with a constant and a bias only: logits are known."""
    world = any_world
    term = adversarial(world, AdversarialSettings(loss=loss, times=(0,)))
    x = jnp.full((2, *world.shape), 0.5)
    outputs = outputs_of(world, x, sample=2 * x)
    psi = {"w": jnp.full(world.shape, 0.25), "v": jnp.zeros(world.shape), "b": jnp.zeros(())}

    @jax.jit
    def both(psi):
        context = context_of(world, term, 2, aux={DISCRIMINATOR: psi})
        return term.aux.loss(psi, world.frozen, outputs, keys(1, 2)), term.loss(outputs, context)[0]

    (value, metrics), own = both(psi)
    # t' = 0 is all but clean: alpha_0 = 0.9996, sigma_0 = 0.029 on the table.
    real, fake = np.asarray(metrics["real"]), np.asarray(metrics["fake"])
    np.testing.assert_allclose(real, 1.0, atol=0.06)
    np.testing.assert_allclose(fake, 0.5, atol=0.06)
    if loss == "hinge":
        expected = np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)
        np.testing.assert_allclose(own, -0.5, atol=0.06)
    else:
        expected = np.log1p(np.exp(-real)) + np.log1p(np.exp(fake))
        np.testing.assert_allclose(own, np.log1p(np.exp(-0.5)), atol=0.03)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def spied(world, settings):
    """The term with a discriminator that keeps what it is shown."""
    seen = []

    def network(z, t, conditioning):
        seen.append((z, t))
        return (jnp.zeros((len(z), 1)),)

    return adversarial(world, settings, network=network), seen


@pytest.mark.parametrize(
    ("level", "above", "then"), [(0, 250, 250), (374, 250, 624), (374, 750, 999)]
)
def test_noise_is_added_from_the_level_on(any_world, level, above, then):
    """Latents at b, noised to t' by equation (3), are distributed as data noised to t' at once.

    Level 0 counts as clean; t' does not go beyond pure noise.
    """
    world, process = any_world, any_world.process
    term, seen = spied(world, AdversarialSettings(times=(above,), real="target"))
    count = 4000
    clean = jnp.full((count, *world.shape), 0.7)
    noise = jax.random.normal(jax.random.key(0), clean.shape)
    z = process.add_noise(clean, noise, times_of(process, [level] * count)) if level else clean
    outputs = outputs_of(world, z, target=z, target_time=process.time(level))
    term.loss(outputs, context_of(world, term, count, aux={DISCRIMINATOR: {}}))
    ((found, t),) = seen
    expected = times_of(process, [then] * count)
    assert t.dtype == process.time_dtype
    np.testing.assert_allclose(t, expected, rtol=1e-6)
    alpha, sigma = (float(level(expected[:1])[0]) for level in (process.alpha, process.sigma))
    np.testing.assert_allclose(found.mean(), 0.7 * alpha, atol=0.02)
    np.testing.assert_allclose(found.std(), sigma, atol=0.02)
    at_b = times_of(process, [level])
    alpha_b, sigma_b = (
        float(at(at_b)[0]) if level else clean
        for at, clean in ((process.alpha, 1.0), (process.sigma, 0.0))
    )
    c = alpha / alpha_b
    fresh = np.sqrt(sigma**2 - c**2 * sigma_b**2)
    drawn = normal(split(keys(0, count), 2)[1], world.shape)
    np.testing.assert_allclose(found, c * z + fresh * drawn, atol=2e-5)


def test_at_the_level_itself_nothing_is_added(any_world):
    """No root of a rounding below 0."""
    world, process = any_world, any_world.process
    term, seen = spied(world, AdversarialSettings(times=(0,), real="target"))
    t = times_of(process, range(1, 999))  # no jump ends in pure noise
    z = jax.random.normal(jax.random.key(0), (998, *world.shape))
    outputs = outputs_of(world, z, target=z)._replace(target_time=t)
    term.loss(outputs, context_of(world, term, 998, aux={DISCRIMINATOR: {}}))
    np.testing.assert_allclose(seen[0][1], t, rtol=1e-6)
    # The root of a rounding: more where a flow's alpha all but vanishes.
    np.testing.assert_allclose(seen[0][0], z, atol=3e-3 if process.discrete else 0.03)


def test_times_are_drawn_for_each_sample_from_those_given(world):
    term, seen = spied(world, AdversarialSettings())
    clean = jnp.zeros((2000, *world.shape))
    outputs = outputs_of(world, clean, sample=clean)
    term.loss(outputs, context_of(world, term, 2000, aux={DISCRIMINATOR: {}}))
    times, counts = np.unique(seen[0][1], return_counts=True)
    np.testing.assert_array_equal(times, [10, 250, 500, 750])
    assert np.all(np.abs(counts / 2000 - 1 / 4) < 0.04)


def test_whole_samples_are_clean_wherever_the_jump_ends(any_world):
    """A prediction and a real latent are held together as x0, also inside a segment."""
    world, process = any_world, any_world.process
    term, seen = spied(world, AdversarialSettings(times=(250,)))
    clean = jnp.full((4000, *world.shape), 0.7)
    outputs = outputs_of(world, clean, sample=clean, target_time=process.time(374))
    term.loss(outputs, context_of(world, term, 4000, aux={DISCRIMINATOR: {}}))
    term.aux.loss({}, world.frozen, outputs, keys(2, 4000))
    expected = times_of(process, [250])
    alpha, sigma = (float(level(expected)[0]) for level in (process.alpha, process.sigma))
    for z, t in seen:
        np.testing.assert_allclose(t, expected[0], rtol=1e-6)
        np.testing.assert_allclose(z.mean(), 0.7 * alpha, atol=0.02)
        np.testing.assert_allclose(z.std(), sigma, atol=0.02)
    assert [len(z) for z, _ in seen] == [4000, 8000]


def test_real_and_fake_are_noised_apart_and_told_apart(world):
    """Side by side, to one time, with the conditioning of their own sample."""
    term, seen = spied(world, AdversarialSettings(times=(10, 250)))
    x = jnp.zeros((50, *world.shape))
    term.aux.loss({}, world.frozen, outputs_of(world, x, sample=x + 5), keys(0, 50))
    ((z, t),) = seen
    np.testing.assert_array_equal(t[0::2], t[1::2])
    assert set(np.asarray(t)) == {10, 250}
    near = np.asarray(t[0::2]) == 10
    assert np.all(z[0::2][near] > 4) and np.all(np.abs(z[1::2][near]) < 1)
    noise = z[0::2] - 5 * jnp.asarray(world.process.alphas)[t[0::2]][:, None, None, None]
    assert not np.any(np.abs(noise - z[1::2]) < 1e-6)


def test_a_time_beyond_the_process_is_refused(any_world):
    settings = AdversarialSettings(times=(10, 1000))
    with pytest.raises(ValueError, match="the largest of times = 1000: must be at most 999"):
        settings.load(roles.model_of(any_world), any_world.networks, LoRAConfig())


def test_adversarial_training_carries_one_step_towards_the_sample(world):
    """A generator whose mean is off, against a quadratic discriminator, gets there."""
    term = adversarial(world, AdversarialSettings(loss="softplus", times=(10, 250)))
    aux, centre = term.aux, jnp.asarray(world.mean)
    assert (aux.name, aux.updates, aux.b1) == (DISCRIMINATOR, 5, 0.0)
    student, rival = optax.adam(0.02, b1=0.0), optax.adam(0.02, b1=0.0)

    def update(carry, index):
        mean, moments, psi, psi_moments = carry
        fake_key, real_key, aux_key, own_key = jax.random.split(
            jax.random.fold_in(jax.random.key(0), index), 4
        )
        noise = 0.3 * jax.random.normal(fake_key, (64, *world.shape))
        other = 0.3 * jax.random.normal(real_key, (64, *world.shape))
        aux_keys, own_keys = jax.random.split(aux_key, 64), jax.random.split(own_key, 64)
        outputs = outputs_of(world, mean + noise, sample=centre + other)
        slope = jax.grad(lambda p: jnp.mean(aux.loss(p, world.frozen, outputs, aux_keys)[0]))(psi)
        # Weight decay stops the two from circling each other.
        slope = jax.tree.map(lambda g, p: g + 0.05 * p, slope, psi)
        change, psi_moments = rival.update(slope, psi_moments)
        psi = optax.apply_updates(psi, change)

        def loss(mean):
            outputs = outputs_of(world, mean + noise, sample=centre + other)
            context = context_of(world, term, 64, aux={DISCRIMINATOR: psi})
            return jnp.mean(term.loss(outputs, context._replace(keys=own_keys))[0])

        change, moments = student.update(jax.grad(loss)(mean), moments)
        return (optax.apply_updates(mean, change), moments, psi, psi_moments), mean

    mean, psi = jnp.zeros(world.shape), aux.init(jax.random.key(0))
    start = (mean, student.init(mean), psi, rival.init(psi))
    path = jax.jit(lambda c: jax.lax.scan(update, c, jnp.arange(600))[1])(start)
    distance = jnp.sqrt(jnp.mean((path - centre) ** 2, axis=(1, 2, 3)))
    assert float(distance[0]) > 0.5 and float(jnp.mean(distance[-100:])) < 0.1
