import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tlcm_jax.diffusion.prediction import eps_from_x0

from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.distillation import trajectory_kd as trajectories
from tlcm_jax.distillation.trajectory_kd import TrajectoryRegressionSettings


def make(world, **changes):
    settings = TrajectoryRegressionSettings(guidance_scale=2.0, **changes)
    return trajectories.trajectory_regression(world.networks, world.schedule, world.shape, settings)


def points_of(world, objective, batch):
    arguments = (world.trainable(), world.frozen, {"conditioning": world.conditioning(batch)})
    return jax.jit(objective.produce)(*arguments, jax.random.key(0))


@pytest.mark.parametrize("substeps", [1, 3])
def test_points_are_the_milestones_of_the_guided_teacher_s_path(world, substeps):
    points = points_of(world, make(world, teacher_substeps=substeps), 5)
    falling = paths.milestones(8)
    np.testing.assert_array_equal(points.t, np.tile(falling[:-1], 5))
    z = points.z.reshape(5, 8, *world.shape)
    end = points.end.reshape(5, 8, *world.shape)
    np.testing.assert_array_equal(end, np.broadcast_to(end[:, :1], end.shape))
    teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    follow = jnp.concatenate([z, end[:, :1]], axis=1)
    for k, (high, low) in enumerate(zip(falling, falling[1:], strict=False)):
        start, steps = jnp.full(5, high), jnp.full(5, substeps)
        times = paths.equal_times(start, jnp.full(5, low), steps, substeps)
        here = world.conditioning(5)
        _, then = paths.teacher_path(teacher, world.schedule, z[:, k], times, here)
        np.testing.assert_allclose(follow[:, k + 1], then, atol=2e-5)


@pytest.mark.parametrize(("segments", "substeps"), [(25, 2), (50, 1), (8, 6)])
def test_paths_of_25_to_50_nodes_end_near_the_flow_s_end(world, segments, substeps):
    """Every node a state, every other, or the milestones alone; DDIM's error is the path's."""
    objective = make(world, segments=segments, teacher_substeps=substeps)
    points = points_of(world, objective, 64)
    t = jnp.asarray(points.t)
    assert len(t) == 64 * segments and len(set(np.asarray(t))) == segments
    data = world.guided(len(t))
    start = points.t == 999
    whole = gaussian.flow(world.schedule, points.z, t, jnp.zeros_like(t), data)
    error = np.abs(np.asarray(points.end - whole))[np.asarray(start)]
    assert error.mean() < 0.05
    coarse = points_of(world, make(world, teacher_substeps=1), 64)
    again = gaussian.flow(
        world.schedule, coarse.z, coarse.t, jnp.zeros_like(coarse.t), world.guided(64 * 8)
    )
    assert np.abs(coarse.end - again)[np.asarray(coarse.t) == 999].mean() > 3 * error.mean()


def test_paths_begin_in_pure_noise(world):
    points = points_of(world, make(world), 2000)
    start = np.asarray(points.z)[np.asarray(points.t) == 999]
    assert abs(start.mean()) < 0.03
    assert abs(start.std() - 1) < 0.03


def with_constant_student(world, **changes):
    """The objective where the student sees 0.5 everywhere."""

    def constant(trainable, frozen):
        return lambda z, t, c: eps_from_x0(world.schedule, z, jnp.full_like(z, 0.5), t)

    networks = type(world.networks)(
        student=constant, teacher=world.networks.teacher, null=world.networks.null
    )
    settings = TrajectoryRegressionSettings(guidance_scale=2.0, **changes)
    return trajectories.trajectory_regression(networks, world.schedule, world.shape, settings)


def test_a_share_of_the_paths_begins_at_the_student_s_noisy_samples(world):
    count, substeps = 1500, 3
    objective = with_constant_student(world, own_states=0.25, teacher_substeps=substeps)
    points = points_of(world, objective, count)
    t = np.asarray(points.t).reshape(count, 8)
    z = np.asarray(points.z).reshape(count, 8, *world.shape)
    own = t[:, 0] < 999
    assert abs(own.mean() - 0.25) < 0.04
    np.testing.assert_array_equal(t[~own], np.tile(paths.milestones(8)[:-1], (sum(~own), 1)))
    assert set(t[own, 0]) == set(paths.milestones(8)[1:-1])
    alpha, sigma = (
        np.asarray(level(jnp.asarray(t[own, 0])))
        for level in (world.schedule.alpha, world.schedule.sigma)
    )
    noise = (z[own, 0] - 0.5 * alpha) / sigma
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    # From there they are the teacher's: 24 equal steps to the end, of which each third is seen.
    rows = np.flatnonzero(own)
    start, steps = points.t.reshape(count, 8)[rows, 0], jnp.full(len(rows), 24)
    times = paths.equal_times(start, jnp.zeros_like(start), steps, 24)
    np.testing.assert_array_equal(t[rows], times[:, :-1:substeps])
    teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    here = jax.tree.map(lambda x: x[rows], world.conditioning(count))
    nodes, end = paths.teacher_path(teacher, world.schedule, jnp.asarray(z[rows, 0]), times, here)
    np.testing.assert_allclose(np.moveaxis(nodes.z[::substeps], 0, 1), z[rows], atol=2e-5)
    ends = np.asarray(points.end).reshape(count, 8, *world.shape)[rows, 0]
    np.testing.assert_allclose(end, ends, atol=2e-5)


def test_the_weight_is_the_clipped_snr(world):
    points = points_of(world, make(world), 4)
    objective = with_constant_student(world, snr_limit=5.0)
    loss, metrics = objective.loss(None, world.frozen, points, jax.random.key(0))
    expected = np.mean(np.square(0.5 - np.asarray(points.end)), axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["mse_x0"], expected, rtol=1e-4)
    alphas = np.asarray(world.schedule.alphas_cumprod)[np.asarray(points.t)]
    weight = np.minimum(1 / (1 - alphas), 5.0)  # SNR + 1
    np.testing.assert_allclose(loss, weight * expected, rtol=1e-4)
    assert weight.min() < 1.1 and weight.max() == 5.0


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
