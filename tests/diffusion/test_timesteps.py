"""Milestones, segments and strata on tables of integers and on the real line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.noise import times as times_of
from tlcm_jax.diffusion import timesteps


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def test_the_paper_s_milestones():
    assert timesteps.milestone_indices(8) == (999, 874, 749, 624, 499, 374, 249, 124, 0)
    assert timesteps.milestone_indices(4) == (999, 749, 499, 249, 0)
    assert timesteps.milestone_indices(1) == (999, 0)
    assert timesteps.shortest_segment(8) == 124


@pytest.mark.parametrize("segments", [0, 1000])
def test_the_time_axis_bounds_the_segments(segments):
    with pytest.raises(ValueError, match=f"segments = {segments}.*1 to 999 segments"):
        timesteps.milestone_indices(segments)


def test_milestones_are_the_process_s_own_times(process):
    found = timesteps.milestones(process, 8)
    assert found.dtype == process.time_dtype
    np.testing.assert_array_equal(found, times_of(process, timesteps.milestone_indices(8)))


def test_the_table_of_student_timesteps():
    for steps in range(1, 9):
        found = timesteps.student_timesteps(steps)
        assert len(found) == steps and found[0] == 999
        assert list(found) == sorted(found, reverse=True)
        assert set(found) <= set(timesteps.milestone_indices(8)[:-1])
    assert timesteps.student_timesteps(3) == (999, 499, 124)
    assert timesteps.student_timesteps(4) == (999, 749, 499, 124)
    assert timesteps.student_timesteps(8) == timesteps.milestone_indices(8)[:-1]


@pytest.mark.parametrize("steps", [0, 9, -1])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}: .*1 to 8"):
        timesteps.student_timesteps(steps)


@pytest.mark.parametrize("segments", [1, 3, 8])
def test_every_time_lies_above_its_lower_bound_and_not_above_the_next(process, segments):
    t = times_of(process, np.arange(1, 1000))
    low = timesteps.segment_lower_bound(process, t, segments)
    assert low.dtype == process.time_dtype
    edges = timesteps.milestones(process, segments)
    assert set(np.unique(low)) == set(edges[1:])
    high = edges[::-1][np.searchsorted(edges[::-1], low) + 1]
    assert np.all((low < t) & (t <= high))


@pytest.mark.parametrize(("segments", "points"), [(8, 1), (8, 2), (8, 4), (4, 3), (8, 124)])
def test_each_stratum_holds_one_point(process, segments, points):
    found = np.asarray(timesteps.stratified_times(process, keys(0, 500), segments, points))
    assert found.shape == (500, segments * points + 1) and found.dtype == process.time_dtype
    assert np.all(found[:, 0] == process.start)
    edges = timesteps.milestones(process, segments)
    by_segment = found[:, 1:].reshape(500, segments, points)
    assert np.all((by_segment > edges[1:, None]) & (by_segment <= edges[:-1, None]))
    assert np.all(np.diff(found[:, 1:]) < 0)
    # One u a path: a point is as far into its stratum as its sisters are, but for rounding.
    first = by_segment - process.discrete - edges[1:, None]
    place = first / (edges[:-1] - edges[1:])[:, None] * points % 1
    assert len(np.unique(found[:, 1])) > min(50, 60 // points)
    if points == 1:
        away = np.abs(place - place[:, :1])
        assert np.max(np.minimum(away, 1 - away)) < 0.02


def test_strata_cover_a_segment_evenly(process):
    found = np.asarray(timesteps.stratified_times(process, keys(1, 20_000), 8, 2))[:, 1:3]
    high, low = timesteps.milestones(process, 8)[:2]
    counts, _ = np.histogram(
        np.asarray(found), 25, (low + process.discrete, high + process.discrete)
    )
    assert counts.sum() == 40_000
    assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()


def test_random_times_lie_in_their_segments_and_cover_them(process):
    segment, t = timesteps.random_times(process, keys(2, 20_000), 4)
    assert t.dtype == process.time_dtype
    edges = timesteps.milestones(process, 4)[::-1]
    assert np.all((edges[segment] < t) & (t <= edges[segment + 1]))
    assert np.all(np.abs(np.bincount(segment) / 5000 - 1) < 0.05)
    inside = (t - edges[segment]) / (edges[segment + 1] - edges[segment])
    assert np.all(np.abs(np.histogram(np.asarray(inside), 5, (0, 1 + 1e-6))[0] / 4000 - 1) < 0.07)


def test_uniform_times_hold_both_ends_of_a_table_and_stay_inside_a_flow(process):
    low, high = (times_of(process, np.full(4000, step)) for step in (100, 104))
    found = timesteps.uniform_times(process, keys(3, 4000), low, high)
    assert found.dtype == process.time_dtype
    assert np.all((low <= found) & (found <= high))
    if process.discrete:
        np.testing.assert_allclose(np.bincount(found)[100:] / 800, 1, atol=0.12)
    else:
        counts = np.histogram(np.asarray(found), 4, (float(low[0]), float(high[0])))[0]
        np.testing.assert_allclose(counts / 1000, 1, atol=0.12)


def test_a_key_s_time_does_not_depend_on_the_batch(process):
    all_keys = keys(4, 8)
    for draw in (
        lambda k: timesteps.random_times(process, k, 8)[1],
        lambda k: timesteps.stratified_times(process, k, 8, 2),
    ):
        np.testing.assert_array_equal(draw(all_keys)[5:], draw(all_keys[5:]))


def test_earlier_times_count_in_training_steps_down_to_their_floor(process):
    t, floor = times_of(process, [999, 500, 260]), times_of(process, [874, 374, 249])
    found = timesteps.earlier_times(process, t, 20, floor)
    assert found.dtype == process.time_dtype
    np.testing.assert_allclose(found, times_of(process, [979, 480, 249]), atol=1e-6)


def test_subdivided_paths_have_exact_ends_and_are_padded(sd):
    start, end = jnp.array([999, 999, 999]), jnp.array([874, 500, 998])
    found = timesteps.subdivide(sd, start, end, jnp.array([3, 5, 1]), 5)
    np.testing.assert_array_equal(
        found,
        [
            [999, 958, 916, 874, 874, 874],
            [999, 900, 800, 700, 600, 500],
            [999, 998, 998, 998, 998, 998],
        ],
    )


def test_subdivided_flows_have_equal_steps(process):
    if process.discrete:
        pytest.skip("times of a table are whole: the test above")
    start, end = jnp.array([1.0, 0.9]), jnp.array([0.1, 0.3])
    found = timesteps.subdivide(process, start, end, jnp.array([3, 2]), 4)
    expected = [[1, 0.7, 0.4, 0.1, 0.1], [0.9, 0.6, 0.3, 0.3, 0.3]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[:, -1], end)  # padding repeats it to the last bit
    np.testing.assert_array_equal(found[1, 2:], np.float32(0.3))


@pytest.mark.parametrize("wrong", [(), (499, 999), (999, 999), (1000,), (10, -1)])
def test_training_steps_must_fall_inside_the_schedule(process, wrong):
    with pytest.raises(ValueError, match="grid = .*must fall strictly, inside 0 .. 999"):
        timesteps.check_timesteps(process, wrong, "grid")
