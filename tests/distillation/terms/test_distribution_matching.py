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
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import split
from tlcm_jax.distillation.terms.compose import value_and_grad_at
from tlcm_jax.distillation.terms.distribution_matching import (
    FAKE_SCORE,
    DistributionMatchingSettings,
)
from tlcm_jax.models.lora import LoRAConfig


def at(world, term, x, phi, seed=1, **more):
    """The term's value and gradient at a prediction x."""

    @jax.jit
    def found(x, phi):
        def loss(x):
            context = context_of(world, term, len(x), aux={FAKE_SCORE: phi}, seed=seed)
            return term.loss(outputs_of(world, x, **more), context)

        return value_and_grad_at(loss, x)[:2]

    return found(x, phi)


def segment(world, z_m, t_m, s):
    """What a student was asked at, and where its segment ends, by field of its outputs."""
    t_m, s = (times_of(world.process, [step] * len(z_m)) for step in (t_m, s))
    return dict(z_m=z_m, t_m=t_m, next_time=s)


@pytest.mark.parametrize("changes", [{}, {"noised": "state"}, {"guidance_times": "own"}])
def test_there_is_no_gradient_at_all_where_fake_and_real_agree(any_world, changes):
    """Fake = teacher and w = 1: exactly 0, to the last bit."""
    term = matching(any_world, DistributionMatchingSettings(guidance_scale=1.0, **changes))
    x, z_m = jax.random.normal(jax.random.key(0), (2, 16, *any_world.shape))
    asked = segment(any_world, z_m, 749, 499)
    value, gradient = at(any_world, term, x, term.aux.init(jax.random.key(0)), **asked)
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
    z, t, noise, held = term._renoised(outputs_of(world, x), keys(0, 3000))
    assert held is noise
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

    z, t, noise, _ = term._renoised(outputs_of(world, x), keys(2, 2000))
    eps = gaussian.eps(process, z, t, world.conditioning(2000))
    expected = np.mean(np.square(eps - noise).reshape(2000, -1), axis=1)
    found = loss(right)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    for wrong in (
        {**right, "shift": right["shift"] + 0.3},
        {**right, "spread": right["spread"] + 1},
    ):
        assert np.mean(loss(wrong)) > 1.01 * np.mean(found)


# Along a trajectory (TDM).


def test_a_state_is_noised_inside_its_segment(any_world):
    """Equation (4): z_s = step(z_m, x, t_m -> s), diffused on to t' ~ U{s .. t_m - 1}."""
    world, process = any_world, any_world.process
    term = matching(world, DistributionMatchingSettings(noised="state"))
    assert term.needed_outputs == ("next_time",)
    x, z_m = jnp.full((2, 3000, *world.shape), 0.7) * jnp.array([1.0, -1.0]).reshape(
        2, *[1] * (1 + len(world.shape))
    )
    asked = segment(world, z_m, 749, 499)
    z, t, noise, held = term._renoised(outputs_of(world, x, **asked), keys(0, 3000))
    low, high = process.time(499), process.time(748)
    share = (np.asarray(t, np.float64) - low) / (high - low)
    assert share.min() >= 0 and share.max() <= 1
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.std() - 12**-0.5) < 0.01
    np.testing.assert_allclose(z, process.add_noise(x, held, t), atol=1e-5)  # what m is
    # From the state at s, where the student's sampler goes, with the variance that t' asks for.
    s = asked["next_time"]
    state = process.step(z_m, x, asked["t_m"], s)
    ratio = process.alpha(t) / process.alpha(s)
    added = np.asarray(z - bcast_right(ratio, z) * state)
    size = np.sqrt(np.maximum(process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2, 0))
    np.testing.assert_allclose(added, bcast_right(jnp.asarray(size), z) * noise, atol=1e-4)


def test_the_last_state_is_the_prediction_itself(any_world):
    """As the sampler's last step is; (4) is then (1) below t_m, and (5) is (3)."""
    world, process = any_world, any_world.process
    x, z_m = jax.random.normal(jax.random.key(0), (2, 200, *world.shape))
    s = jnp.full(200, process.end, process.time_dtype)
    asked = dict(segment(world, z_m, 249, 0), next_time=s)
    term = matching(world, DistributionMatchingSettings(noised="state"))
    outputs = outputs_of(world, x, **asked)
    z, t, noise, held = term._renoised(outputs, keys(0, 200))
    np.testing.assert_allclose(held, noise, atol=1e-4)
    np.testing.assert_allclose(z, process.add_noise(x, noise, t), atol=1e-5)
    assert t.min() >= process.time(20) and t.max() <= process.time(248)
    phi = term.aux.init(jax.random.key(0))
    found = term.aux.loss(phi, world.frozen, outputs, keys(0, 200))[0]
    eps = gaussian.eps(process, z, t, world.conditioning(200))
    expected = np.mean(np.square(eps - noise).reshape(200, -1), axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


def test_importance_makes_a_noised_state_stand_for_a_noised_prediction(any_world):
    """Of one element, up to the widths' ratio: E w g(z) over e is E g(alpha x + sigma m)."""
    process = any_world.process
    t, s = times_of(process, [600]), times_of(process, [400])
    alpha, sigma, sigma_s = (
        float(v[0]) for v in (process.alpha(t), process.sigma(t), process.sigma(s))
    )
    ratio = alpha / float(process.alpha(s)[0])
    fresh = (sigma**2 - (ratio * sigma_s) ** 2) ** 0.5
    x, own = 0.4, 1.3  # the prediction, and the noise that its state holds
    e = np.linspace(-12, 12, 200_001)  # further out the weight overflows
    z = alpha * x + ratio * sigma_s * own + fresh * e
    held = (z - alpha * x) / sigma
    column = [jnp.asarray(v, jnp.float32)[:, None] for v in (e, held)]
    weight = np.asarray(losses.importance_weight(*column), np.float64)
    density = np.exp(-(e**2) / 2) / np.sqrt(2 * np.pi) * (e[1] - e[0])
    found = np.sum(density * weight * fresh / sigma * np.cos(z))
    assert found == pytest.approx(np.cos(alpha * x) * np.exp(-(sigma**2) / 2), rel=1e-4)


# Decoupled.


def test_at_one_time_the_two_parts_are_the_whole(any_world):
    """Equation (6) with t'' = t' is (2)."""
    world = any_world
    x = jax.random.normal(jax.random.key(0), (8, *world.shape))
    phi = {"shift": jnp.full(world.shape, 0.2), "spread": jnp.full(world.shape, -0.1)}
    asked = segment(world, x, 749, 499)
    whole, parts = (
        at(world, matching(world, DistributionMatchingSettings(
            guidance_scale=3.0, low=500, high=500, guidance_times=times)), x, phi, **asked)
        for times in ("shared", "own")
    )  # fmt: skip
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)


def test_guidance_has_times_of_its_own_below_the_student_s(any_world):
    """Equation (6) in closed form, with t_m the lowest time, so that t'' is known."""
    world, process = any_world, any_world.process
    settings = DistributionMatchingSettings(
        guidance_scale=3.0, low=100, high=900, guidance_times="own"
    )
    term = matching(world, settings)
    assert term.nfe.teacher == 3
    x = jax.random.normal(jax.random.key(0), (8, *world.shape))
    phi = {"shift": jnp.full(world.shape, 0.2), "spread": jnp.full(world.shape, -0.1)}
    _, found = at(world, term, x, phi, **segment(world, x, 100, 0))
    z, t, noise, _ = term._renoised(outputs_of(world, x), keys(1, 8))
    assert len(set(np.asarray(t).tolist())) > 4
    data, own_t = world.conditioning(8), times_of(process, [100] * 8)
    null = Gaussian(*(jnp.repeat(leaf, 8, axis=0) for leaf in world.frozen["null"]))
    noisy = process.add_noise(x, noise, own_t)
    push = gaussian.x0(process, noisy, own_t, data) - gaussian.x0(process, noisy, own_t, null)
    real = gaussian.x0(process, z, t, data) + 2.0 * push
    own = Gaussian(data.mean + phi["shift"], data.variance * jnp.exp(phi["spread"]))
    fake = gaussian.x0(process, z, t, own)
    size = jnp.mean(jnp.abs(x - real).reshape(8, -1), axis=1)
    np.testing.assert_allclose(
        found, (fake - real) / bcast_right(size, x) / 4, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noised": "x"}, "noised = 'x': must be one of prediction, state"),
        ({"guidance_times": "all"}, "guidance_times = 'all': must be one of shared, own"),
        ({"noised": "state", "guidance_times": "own"}, "take 'shared'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DistributionMatchingSettings(**changes)


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
