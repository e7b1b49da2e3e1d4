import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.diffusion import ddim, gaussian
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.prediction import predict_x0


def test_the_paper_s_milestones():
    assert paths.milestones(8) == (999, 874, 749, 624, 499, 374, 249, 124, 0)
    assert paths.milestones(4) == (999, 749, 499, 249, 0)
    assert paths.milestones(1) == (999, 0)
    assert paths.shortest_segment(8) == 124


@pytest.mark.parametrize("segments", [0, 1000])
def test_the_time_axis_bounds_the_segments(segments):
    with pytest.raises(ValueError, match=f"segments = {segments}.*1 to 999 segments"):
        paths.milestones(segments)


@pytest.mark.parametrize("segments", [1, 3, 8])
def test_every_time_lies_above_its_floor_and_not_above_the_next(segments):
    t = jnp.arange(1, 1000)
    low = paths.segment_floor(t, segments)
    edges = np.asarray(paths.milestones(segments))
    assert set(np.unique(low)) == set(edges[1:])
    high = edges[::-1][np.searchsorted(edges[::-1], low) + 1]
    assert np.all((low < t) & (t <= high))


@pytest.mark.parametrize(("segments", "nodes"), [(8, 1), (8, 2), (8, 4), (4, 3), (8, 124)])
def test_each_stratum_holds_one_node(segments, nodes):
    times = np.asarray(paths.node_times(jax.random.key(0), 500, segments, nodes))
    assert times.shape == (500, segments * nodes + 1)
    assert np.all(times[:, 0] == 999)
    edges = np.asarray(paths.milestones(segments))
    by_segment = times[:, 1:].reshape(500, segments, nodes)
    assert np.all((by_segment > edges[1:, None]) & (by_segment <= edges[:-1, None]))
    assert np.all(np.diff(times[:, 1:]) < 0)
    # One u a path: a node is as far into its stratum as its sisters are, but for rounding.
    place = (by_segment - 1 - edges[1:, None]) / (edges[:-1] - edges[1:])[:, None] * nodes % 1
    assert len(np.unique(times[:, 1])) > min(50, 60 // nodes)
    if nodes == 1:
        assert np.max(np.abs(place - place[:, :1])) < 0.02


def test_node_times_cover_a_segment_evenly():
    times = np.asarray(paths.node_times(jax.random.key(1), 20_000, 8, 2))[:, 1:3]
    counts = np.bincount(times.ravel(), minlength=1000)[875:]
    assert counts.sum() == 40_000
    assert counts.min() > 0.75 * counts.mean() and counts.max() < 1.25 * counts.mean()


def test_equal_times_have_exact_ends_and_wait():
    start, end = jnp.array([999, 999, 999]), jnp.array([874, 500, 998])
    times = paths.equal_times(start, end, jnp.array([3, 5, 1]), 5)
    np.testing.assert_array_equal(
        times,
        [
            [999, 958, 916, 874, 874, 874],
            [999, 900, 800, 700, 600, 500],
            [999, 998, 998, 998, 998, 998],
        ],
    )


def test_a_path_is_a_loop_of_ddim_steps_with_one_call_a_node(schedule):
    data = gaussian.Gaussian(jnp.full((3, 2, 2, 1), 0.4), jnp.full((3, 2, 2, 1), 0.3))
    times = jnp.concatenate(
        [paths.node_times(jax.random.key(0), 3, 8, 2), jnp.zeros((3, 1), jnp.int32)], axis=1
    )
    noise = jax.random.normal(jax.random.key(1), (3, 2, 2, 1))
    oracle, calls = gaussian.denoiser(schedule), []

    def counting(z, t, conditioning):
        jax.debug.callback(lambda: calls.append(1))
        return oracle(z, t, conditioning)

    walk = jax.jit(lambda noise: paths.teacher_path(counting, schedule, noise, times, data))
    nodes, last = walk(noise)
    jax.effects_barrier()
    assert len(calls) == 17 == len(nodes.z)
    np.testing.assert_array_equal(nodes.t, times[:, :-1].T)

    z = noise
    for k in range(17):
        t, s = times[:, k], times[:, k + 1]
        np.testing.assert_allclose(nodes.z[k], z, atol=1e-5)
        np.testing.assert_allclose(nodes.eps[k], oracle(z, t, data), atol=1e-5)
        z = ddim.step(schedule, z, predict_x0(oracle, schedule, z, t, data), t, s)
    np.testing.assert_allclose(last, z, atol=1e-5)


def test_a_path_that_has_arrived_waits_to_the_last_bit(schedule):
    data = gaussian.Gaussian(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)))
    noise = jax.random.normal(jax.random.key(1), (1, 2, 2, 1))
    walk = jax.jit(
        lambda times: paths.teacher_path(gaussian.denoiser(schedule), schedule, noise, times, data)
    )
    nodes, last = walk(jnp.array([[999, 500, 300, 300, 300, 300]]))
    for z in (*nodes.z[2:], last):
        np.testing.assert_array_equal(z, nodes.z[2])
