"""Pairs from noised data: the states, the teacher's other steps, and an EMA's target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.gaussian_world import keys
from tlcm_jax.diffusion import gaussian, solvers
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.timesteps import milestones, segment_lower_bound, subdivide
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.terms.compose import EMA, StageLoss


def settings(**changes):
    return MLCDSettings(**{"guidance_scale": 2.0, "mode": "data", **changes})


def make(world, **changes):
    return settings(**changes).build(world.networks)


def pairs_of(world, objective, size, latents=None):
    latents = world.latents(jax.random.key(3), size) if latents is None else latents
    batch = {"conditioning": world.conditioning(size), "latents": latents}
    return world.pairs(objective, size, batch=batch)


def levels(world, t):
    """Alpha and sigma at times, shaped to meet latents."""
    like = jnp.zeros((len(t), *world.shape))
    process = world.process
    return bcast_right(process.alpha(t), like), bcast_right(process.sigma(t), like)


def test_states_are_noised_latents_at_times_of_every_segment(any_world):
    world = any_world
    real = jnp.full((8000, *world.shape), 1.5, jnp.float16)
    pairs = pairs_of(world, make(world), 8000, real)
    np.testing.assert_array_equal(pairs.sample, real)
    t = np.asarray(pairs.t_m)
    np.testing.assert_array_equal(
        pairs.target_time, segment_lower_bound(world.process, pairs.t_m, 8)
    )
    edges = milestones(world.process, 8)[::-1]
    share = np.bincount(np.searchsorted(edges, t) - 1, minlength=8) / 8000
    np.testing.assert_allclose(share, 1 / 8, atol=0.02)
    alpha, sigma = levels(world, pairs.t_m)
    noise = (pairs.z_m - 1.5 * alpha) / sigma
    # On a flow, noise that is all but gone cannot be read back from fp32.
    noise = noise[np.asarray(sigma).ravel() > 1e-3]
    assert len(noise) > 7900
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert pairs.z_m.dtype == jnp.float32


@pytest.mark.parametrize("mode", ["data", "node_reuse"])
def test_the_teacher_walks_the_skip_in_equal_steps(any_world, mode):
    world, process = any_world, any_world.process
    pairs = pairs_of(world, make(world, skip=24, teacher_substeps=3, mode=mode), 64)
    teacher = world.networks.guided_teacher(world.frozen, 2.0)
    stops = subdivide(process, pairs.t_m, pairs.t_n, jnp.full(len(pairs.t_m), 3), 3)
    expected = teacher_path(teacher, process, pairs.z_m, stops, pairs.conditioning)[1]
    np.testing.assert_allclose(pairs.z_n, expected, atol=2e-5)
    assert np.sum(np.asarray(pairs.t_n > pairs.target_time)) > 20
    if process.discrete:
        whole = np.asarray(pairs.t_m - pairs.target_time) > 24
        assert whole.sum() > 20 and np.all((pairs.t_m - pairs.t_n)[whole] == 24)


def test_the_adjusted_teacher_takes_its_variance_from_the_data_and_the_conditional_model(
    any_world,
):
    world, process = any_world, any_world.process
    pairs = pairs_of(world, make(world, skip=100, solver="addim"), 64)
    z, t, s = pairs.z_m, pairs.t_m, pairs.t_n
    guess = gaussian.x0(process, z, t, world.guided(64))
    plain = gaussian.x0(process, z, t, world.conditioning(64))
    variance = jnp.mean(((pairs.sample - plain) ** 2).reshape(64, -1), axis=1)
    expected = solvers.adjusted_step(process, z, guess, variance, t, s)
    np.testing.assert_allclose(pairs.z_n, expected, atol=2e-5)
    assert np.max(np.abs(expected - process.step(z, guess, t, s))) > 0.02


def test_the_stochastic_teacher_draws_every_step_anew(any_world):
    world, process, size = any_world, any_world.process, 4000
    real = jnp.repeat(world.mean[None], size, axis=0)
    pairs = pairs_of(world, make(world, segments=1, skip=200, solver="sde"), size, real)
    t, s = pairs.t_m, pairs.t_n
    guess = gaussian.x0(process, pairs.z_m, t, world.guided(size))
    nothing = jnp.zeros_like(pairs.z_m)
    drawn = pairs.z_n - solvers.ancestral_step(process, pairs.z_m, guess, nothing, t, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(world, t), levels(world, s)
    kept = alpha_t * sigma_s / (alpha_s * sigma_t)
    fresh = sigma_s * jnp.sqrt(1 - jnp.square(kept))
    moved = np.asarray(s > process.end)  # at a flow's clean end nothing is drawn
    unit = np.asarray(drawn / fresh)[moved]
    assert abs(unit.mean()) < 0.02 and abs(unit.std() - 1) < 0.02
    added = np.asarray((pairs.z_m - alpha_t * real) / sigma_t)[moved]
    assert abs(np.mean(unit * added)) < 0.02  # not the noise of the state again


def test_the_stochastic_teacher_s_substeps_draw_apart(world):
    """Two substeps with the noise of one would be a longer random walk than with two."""
    objective = make(world, segments=1, skip=400, teacher_substeps=2, solver="sde")
    size, process = 4000, world.process
    pairs = pairs_of(world, objective, size)
    whole = np.asarray(pairs.t_n > 100)
    mid = subdivide(process, pairs.t_m, pairs.t_n, jnp.full(size, 2), 2)[:, 1]
    still = jnp.zeros_like(pairs.z_m)

    def mean_and_fresh(z, t, s):
        """An affine step's mean, its noise, and what it multiplies what came before by."""
        guess = gaussian.x0(process, z, t, world.guided(size))
        mean = solvers.ancestral_step(process, z, guess, still, t, s)
        one = solvers.ancestral_step(process, still, still, jnp.ones_like(z), t, s)
        nudged = gaussian.x0(process, z + 1, t, world.guided(size))
        return mean, one, solvers.ancestral_step(process, z + 1, nudged, still, t, s) - mean

    mean, first, _ = mean_and_fresh(pairs.z_m, pairs.t_m, mid)
    mean, second, gain = mean_and_fresh(mean, mid, pairs.t_n)
    unit = (pairs.z_n - mean) / jnp.sqrt(jnp.square(second) + jnp.square(gain * first))
    assert abs(float(jnp.std(unit[whole])) - 1) < 0.03


def test_the_target_may_be_the_jump_of_the_ema(world):
    objective = make(world, target="ema", segments=1)
    assert objective.target_is_ema and not make(world).target_is_ema
    pairs, process = pairs_of(world, objective, 32), world.process
    now, past = (jax.tree.map(lambda x, a=a: x + a, world.trainable()) for a in (0.3, 0.1))

    def loss(now, past):
        found = StageLoss(objective)(now, world.frozen, pairs, keys(0, 32), {EMA: past})
        return jnp.mean(found[0])

    value, (by_now, by_past) = jax.value_and_grad(loss, argnums=(0, 1))(now, past)

    def jump(trainable, z, t):
        x0 = world.student(trainable, world.frozen)(z, t, pairs.conditioning)
        return process.step(z, x0, t, pairs.target_time)

    ends = bcast_right(pairs.t_n == pairs.target_time, pairs.z_n)
    target = jnp.where(ends, pairs.z_n, jump(past, pairs.z_n, pairs.t_n))
    expected = jnp.mean((jump(now, pairs.z_m, pairs.t_m) - target) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert any(jnp.any(g) for g in jax.tree.leaves(by_now))
    assert not any(jnp.any(g) for g in jax.tree.leaves(by_past))


@pytest.mark.parametrize("loss_space", ["z", "x0"])
def test_times_are_weighed_alike_or_by_the_clipped_snr(any_world, loss_space):
    world, process = any_world, any_world.process
    alike, weighed = (make(world, loss_space=loss_space, snr_limit=limit) for limit in (1.0, 5.0))
    pairs = pairs_of(world, alike, 64)
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    plain, heavy = (world.loss(o, pairs, theta)[0] for o in (alike, weighed))
    own = {"z": 1.0, "x0": 5.0}[loss_space]
    assert settings(loss_space=loss_space).effective_snr_limit == own
    snr = np.square(process.alpha(pairs.t_m) / process.sigma(pairs.t_m))
    np.testing.assert_allclose(heavy, np.minimum(snr + 1, 5) * plain, rtol=1e-4)
    assert np.min(heavy / plain) < 1.1 and np.max(heavy / plain) > 4.9


def test_only_noised_data_needs_latents(world):
    assert make(world).needs_latents and make(world).has_sample
    for mode in ("node_reuse", "paper", "one_step_state"):
        other = dataclasses.replace(settings(), mode=mode).build(world.networks)
        assert not other.needs_latents and not other.has_sample
        assert world.pairs(other, 2, batch={"conditioning": world.conditioning(2)}).sample is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "heun"}, "solver = 'heun': must be one of ddim, addim, sde"),
        ({"solver": "addim", "mode": "paper"}, "solver = 'addim': needs real latents"),
        (
            {"solver": "sde", "loss_space": "x0"},
            "solver = 'sde': compares x0 over one whole segment only",
        ),
        ({"teacher_substeps": 0}, "teacher_substeps = 0"),
        ({"teacher_substeps": 3, "skip": 2}, "teacher_substeps = 3: must be at most 2"),
        ({"target": "teacher"}, "target = 'teacher': must be one of student, ema"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
