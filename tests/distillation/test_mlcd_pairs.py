"""Pairs from noised data: the states, the teacher's other steps, and an average's target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tlcm_jax.diffusion.prediction import predict_x0

from tlcm_jax.diffusion import ddim, gaussian, solvers
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.mlcd import SegmentConsistencySettings, segment_consistency


def settings(**changes):
    return SegmentConsistencySettings(**{"guidance_scale": 2.0, "mode": "data", **changes})


def make(world, **changes):
    return segment_consistency(world.networks, world.schedule, world.shape, settings(**changes))


def pairs_of(world, objective, size, latents=None):
    latents = world.latents(jax.random.key(3), size) if latents is None else latents
    batch = {"conditioning": world.conditioning(size), "latents": latents}
    produce = jax.jit(objective.produce)
    return produce(world.trainable(), world.frozen, batch, jax.random.key(0))


def test_states_are_noised_latents_at_times_of_every_segment(world):
    real = jnp.full((8000, *world.shape), 1.5, jnp.float16)
    pairs = pairs_of(world, make(world), 8000, real)
    np.testing.assert_array_equal(pairs.data, real)
    t = np.asarray(pairs.t_m)
    np.testing.assert_array_equal(pairs.boundary, paths.segment_floor(pairs.t_m, 8))
    share = np.bincount(np.searchsorted(paths.milestones(8)[::-1], t) - 1, minlength=8) / 8000
    np.testing.assert_allclose(share, 1 / 8, atol=0.02)
    schedule = world.schedule
    noise = (pairs.z_m - 1.5 * schedule.alpha(pairs.t_m)) / schedule.sigma(pairs.t_m)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert pairs.z_m.dtype == jnp.float32


@pytest.mark.parametrize("mode", ["data", "node_reuse"])
def test_the_teacher_walks_the_skip_in_equal_steps(world, mode):
    pairs = pairs_of(world, make(world, skip=24, teacher_substeps=3, mode=mode), 64)
    teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    steps = jnp.full_like(pairs.t_m, 3)
    stops = paths.equal_times(pairs.t_m, pairs.t_n, steps, 3)
    expected = paths.teacher_path(teacher, world.schedule, pairs.z_m, stops, pairs.conditioning)[1]
    np.testing.assert_allclose(pairs.z_n, expected, atol=2e-5)
    whole = np.asarray(pairs.t_m - pairs.boundary) > 24
    assert whole.sum() > 20 and np.all((pairs.t_m - pairs.t_n)[whole] == 24)


def test_the_adjusted_teacher_takes_its_variance_from_the_data_and_the_conditional_model(world):
    pairs = pairs_of(world, make(world, skip=100, solver="addim"), 64)
    schedule, z, t, s = world.schedule, pairs.z_m, pairs.t_m, pairs.t_n
    guess = gaussian.x0(schedule, z, t, world.guided(64))
    plain = gaussian.x0(schedule, z, t, world.conditioning(64))
    variance = jnp.mean((pairs.data - plain) ** 2, axis=(1, 2, 3))
    expected = solvers.adjusted_step(schedule, z, guess, variance, t, s)
    np.testing.assert_allclose(pairs.z_n, expected, atol=2e-5)
    assert np.max(np.abs(expected - ddim.step(schedule, z, guess, t, s))) > 0.02


def test_the_stochastic_teacher_draws_every_step_anew(world):
    size = 4000
    real = jnp.broadcast_to(jnp.asarray(world.mean), (size, *world.shape))
    pairs = pairs_of(world, make(world, segments=1, skip=200, solver="sde"), size, real)
    schedule, t, s = world.schedule, pairs.t_m, pairs.t_n
    guess = gaussian.x0(schedule, pairs.z_m, t, world.guided(size))
    nothing = jnp.zeros_like(pairs.z_m)
    drawn = pairs.z_n - solvers.ancestral_step(schedule, pairs.z_m, guess, nothing, t, s)
    ratio = schedule.alpha(t) / schedule.alpha(s)
    size_of = schedule.sigma(s) / schedule.sigma(t) * jnp.sqrt(1 - ratio**2)
    unit = np.asarray(drawn / size_of)
    assert abs(unit.mean()) < 0.02 and abs(unit.std() - 1) < 0.02
    added = (pairs.z_m - schedule.alpha(t) * real) / schedule.sigma(t)
    assert abs(np.mean(unit * np.asarray(added))) < 0.02  # not the noise of the state again


def test_the_target_may_be_the_jump_of_the_average(world):
    objective = make(world, target="average", segments=1)
    assert objective.parts.average
    pairs = pairs_of(world, objective, 32)
    now, past = (jax.tree.map(lambda x, a=a: x + a, world.trainable()) for a in (0.3, 0.1))

    def loss(now, past):
        found = objective.loss(now, world.frozen, pairs, jax.random.key(0), {"average": past})
        return jnp.mean(found[0])

    value, (by_now, by_past) = jax.value_and_grad(loss, argnums=(0, 1))(now, past)

    def jump(trainable, z, t):
        student = world.student(trainable, world.frozen)
        x0 = predict_x0(student, world.schedule, z, t, pairs.conditioning)
        return ddim.step(world.schedule, z, x0, t, pairs.boundary)

    ends = (pairs.t_n == pairs.boundary)[:, None, None, None]
    goal = jnp.where(ends, pairs.z_n, jump(past, pairs.z_n, pairs.t_n))
    expected = jnp.mean((jump(now, pairs.z_m, pairs.t_m) - goal) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert any(jnp.any(g) for g in jax.tree.leaves(by_now))
    assert not any(jnp.any(g) for g in jax.tree.leaves(by_past))


@pytest.mark.parametrize("loss_space", ["z", "x0"])
def test_times_are_weighed_alike_or_by_the_clipped_snr(world, loss_space):
    alike, weighed = (make(world, loss_space=loss_space, snr_limit=limit) for limit in (1.0, 5.0))
    pairs = pairs_of(world, alike, 64)
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    plain, heavy = (
        o.loss(theta, world.frozen, pairs, jax.random.key(0))[0] for o in (alike, weighed)
    )
    own = {"z": 1.0, "x0": 5.0}[loss_space]
    assert settings(loss_space=loss_space).time_limit == own
    snr = (world.schedule.alphas / world.schedule.sigmas)[np.asarray(pairs.t_m)] ** 2
    np.testing.assert_allclose(heavy, np.minimum(snr + 1, 5) * plain, rtol=1e-4)
    assert stages.find("segment_consistency").needs_latents(settings())
    other = dataclasses.replace(settings(), mode="literal")
    assert not stages.find("segment_consistency").needs_latents(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "heun"}, "solver = 'heun': must be one of ddim, addim, sde"),
        ({"solver": "addim", "mode": "literal"}, "solver = 'addim': needs real latents"),
        (
            {"solver": "sde", "loss_space": "x0"},
            "solver = 'sde': compares x0 over one whole segment only",
        ),
        ({"teacher_substeps": 0}, "teacher_substeps = 0"),
        ({"teacher_substeps": 3, "skip": 2}, "teacher_substeps = 3: must be at most 2"),
        ({"target": "teacher"}, "target = 'teacher': must be one of student, average"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
