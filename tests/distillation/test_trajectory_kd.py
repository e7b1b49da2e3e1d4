import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.gaussian_world import constant_student
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.timesteps import milestones, subdivide
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.distillation.trajectory_kd import TrajectoryKDSettings


def make(world, student=None, **changes):
    networks = world.networks
    if student is not None:
        networks = dataclasses.replace(networks, student=student)
    return TrajectoryKDSettings(guidance_scale=2.0, **changes).build(networks)


@pytest.mark.parametrize("substeps", [1, 3])
def test_states_are_the_milestones_of_the_guided_teacher_s_path(any_world, substeps):
    world, process = any_world, any_world.process
    pairs = world.pairs(make(world, teacher_substeps=substeps), 5)
    falling = milestones(process, 8)
    np.testing.assert_array_equal(pairs.t_m, np.tile(falling[:-1], 5))
    z, end = (leaf.reshape(5, 8, *world.shape) for leaf in (pairs.z_m, pairs.z_n))
    np.testing.assert_array_equal(end, np.broadcast_to(end[:, :1], end.shape))
    np.testing.assert_array_equal(pairs.t_n, process.end)
    np.testing.assert_array_equal(pairs.target_time, process.end)
    teacher = world.networks.guided_teacher(world.frozen, 2.0)
    follow = jnp.concatenate([z, end[:, :1]], axis=1)

    @jax.jit
    def walk(z, high, low):
        start, steps = jnp.full(5, high), jnp.full(5, substeps)
        times = subdivide(process, start, jnp.full(5, low), steps, substeps)
        return teacher_path(teacher, process, z, times, world.conditioning(5))[1]

    for k, (high, low) in enumerate(zip(falling, falling[1:], strict=False)):
        np.testing.assert_allclose(follow[:, k + 1], walk(z[:, k], high, low), atol=2e-5)


@pytest.mark.parametrize(("segments", "substeps"), [(25, 2), (50, 1), (8, 6)])
def test_paths_of_25_to_50_steps_end_near_the_flow_s_end(any_world, segments, substeps):
    """Every step a state, every other, or the milestones alone; DDIM's error is the path's."""
    world, process = any_world, any_world.process

    def error(**changes):
        pairs = world.pairs(make(world, **changes), 64)
        start = np.asarray(pairs.t_m) == process.start
        assert start.sum() == 64
        z, t = pairs.z_m[start], pairs.t_m[start]
        end = gaussian.flow(process, z, t, jnp.full_like(t, process.end), world.guided(64))
        return pairs, np.abs(np.asarray(pairs.z_n[start] - end)).mean()

    pairs, fine = error(segments=segments, teacher_substeps=substeps)
    t = np.asarray(pairs.t_m)
    assert len(t) == 64 * segments and len(set(t)) == segments
    assert fine < 0.05
    assert error(teacher_substeps=1)[1] > 3 * fine


def test_paths_begin_in_pure_noise(any_world):
    pairs = any_world.pairs(make(any_world), 2000)
    start = np.asarray(pairs.z_m)[np.asarray(pairs.t_m) == any_world.process.start]
    assert abs(start.mean()) < 0.03
    assert abs(start.std() - 1) < 0.03


def test_a_share_of_the_paths_begins_at_the_student_s_noisy_samples(any_world):
    world, process = any_world, any_world.process
    count, substeps = 1500, 3
    objective = make(world, constant_student(0.5), own_states=0.25, teacher_substeps=substeps)
    assert objective.uses_student and not make(world).uses_student
    pairs = world.pairs(objective, count)
    t = np.asarray(pairs.t_m).reshape(count, 8)
    z = np.asarray(pairs.z_m).reshape(count, 8, *world.shape)
    own = t[:, 0] < process.start
    assert abs(own.mean() - 0.25) < 0.04
    falling = milestones(process, 8)
    np.testing.assert_array_equal(t[~own], np.tile(falling[:-1], (sum(~own), 1)))
    assert set(t[own, 0]) == set(falling[1:-1])
    first = jnp.asarray(z[own, 0])
    alpha, sigma = (
        bcast_right(level(jnp.asarray(t[own, 0])), first)
        for level in (process.alpha, process.sigma)
    )
    noise = (first - 0.5 * alpha) / sigma
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    # From there they are the teacher's: 24 equal steps to the end, of which each third is seen.
    rows = np.flatnonzero(own)
    start, steps = pairs.t_m.reshape(count, 8)[rows, 0], jnp.full(len(rows), 24)
    times = subdivide(process, start, jnp.full_like(start, process.end), steps, 24)
    rounding = 0 if process.discrete else 2e-7
    np.testing.assert_allclose(t[rows], times[:, :-1:substeps], rtol=0, atol=rounding)
    teacher = world.networks.guided_teacher(world.frozen, 2.0)
    points, end = teacher_path(teacher, process, first, times, world.conditioning(len(rows)))
    np.testing.assert_allclose(np.moveaxis(points.z[::substeps], 0, 1), z[rows], atol=2e-5)
    ends = np.asarray(pairs.z_n).reshape(count, 8, *world.shape)[rows, 0]
    np.testing.assert_allclose(end, ends, atol=2e-5)


def test_the_weight_is_the_clipped_snr(any_world):
    world, process = any_world, any_world.process
    objective = make(world, constant_student(0.5), snr_limit=5.0)
    pairs = world.pairs(objective, 4)
    loss, metrics = world.loss(objective, pairs)
    expected = np.mean(np.square(0.5 - np.asarray(pairs.z_n)).reshape(len(loss), -1), axis=1)
    np.testing.assert_allclose(metrics["mse_x0"], expected, rtol=1e-4)
    snr = np.square(process.alpha(pairs.t_m) / process.sigma(pairs.t_m))
    weight = np.minimum(snr + 1, 5.0)
    np.testing.assert_allclose(loss, weight * expected, rtol=1e-4)
    assert weight.min() < 1.1 and weight.max() > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 0}, "segments = 0"),
        ({"teacher_substeps": 0}, "teacher_substeps = 0"),
        ({"teacher_substeps": 125}, "teacher_substeps = 125: must be at most 124"),
        ({"segments": 7}, "segments = 7: must divide the 1000 times"),
        ({"snr_limit": 0.5}, "snr_limit = 0.5: must be at least 1"),
        ({"own_states": 1.5}, "own_states = 1.5: must be at most 1"),
        ({"own_states": -0.1}, "own_states = -0.1: must be at least 0"),
        ({"own_states": 0.5, "segments": 1}, "own_states = 0.5: needs at least 2 segments"),
        ({"rollout_timesteps": (1000,)}, "rollout_timesteps"),
    ],
)
def test_bad_settings_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        make(world, **changes)
