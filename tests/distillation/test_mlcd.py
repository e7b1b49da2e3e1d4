import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tlcm_jax.diffusion.prediction import eps_from_x0, predict_x0

from tlcm_jax.diffusion import ddim, gaussian
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.distillation.mlcd import SegmentConsistencySettings, segment_consistency
from tlcm_jax.distillation.mlcd_pairs import literal_times


def settings(**changes):
    return SegmentConsistencySettings(guidance_scale=2.0, **changes)


def make(world, chosen, student=None):
    networks = world.networks
    if student is not None:
        networks = dataclasses.replace(networks, student=student)
    return segment_consistency(networks, world.schedule, world.shape, chosen)


def pairs_of(world, objective, batch, key=0):
    arguments = (world.trainable(), world.frozen, {"conditioning": world.conditioning(batch)})
    return jax.jit(objective.produce)(*arguments, jax.random.key(key))


@pytest.fixture(scope="module")
def default_pairs(world):
    """64 paths' worth of pairs by the default settings; no student has a part in them."""
    return pairs_of(world, make(world, settings()), 64)


def loss_of(world, objective, pairs, trainable=None):
    return jax.jit(objective.loss)(trainable, world.frozen, pairs, jax.random.key(0))


def exact_student(world):
    """Its f is the x0 whose DDIM jump lands where the guided flow meets the milestone."""

    def student(trainable, frozen):
        def denoise(z, t, conditioning):
            floor = paths.segment_floor(t, world.segments)
            end = gaussian.flow(world.schedule, z, t, floor, world.guided(z.shape[0]))
            return eps_from_x0(world.schedule, z, ddim.inverse(world.schedule, z, end, t, floor), t)

        return denoise

    return student


def test_the_paper_s_values_are_the_defaults():
    default = SegmentConsistencySettings()
    assert (default.segments, default.skip, default.guidance_scale) == (8, 20, 8.0)
    assert default.loss_space == "z"


@pytest.mark.parametrize("mode", ["node_reuse", "literal"])
def test_pairs_are_two_points_of_one_teacher_trajectory(world, default_pairs, mode):
    pairs = default_pairs
    if mode == "literal":
        pairs = pairs_of(world, make(world, settings(mode="literal")), 64)
    assert np.all((pairs.boundary <= pairs.t_n) & (pairs.t_n < pairs.t_m))
    np.testing.assert_array_equal(pairs.t_n, np.maximum(pairs.t_m - 20, pairs.boundary))
    np.testing.assert_array_equal(pairs.boundary, paths.segment_floor(pairs.t_m, 8))
    teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    x0 = predict_x0(teacher, world.schedule, pairs.z_m, pairs.t_m, pairs.conditioning)
    stepped = ddim.step(world.schedule, pairs.z_m, x0, pairs.t_m, pairs.t_n)
    np.testing.assert_allclose(pairs.z_n, stepped, atol=2e-5)


def test_trajectory_jumps_end_anywhere_between_milestone_and_target(world, default_pairs):
    """Hyper-SD's s ~ U{b .. t_n}; where s = t_n the target is the teacher's latent itself."""
    objective = make(world, settings(landing="trajectory"))
    pairs = pairs_of(world, objective, 64)
    floor = np.asarray(paths.segment_floor(pairs.t_m, 8))
    s, t_n = np.asarray(pairs.boundary), np.asarray(pairs.t_n)
    assert np.all((floor <= s) & (s <= t_n))
    np.testing.assert_array_equal(t_n, np.maximum(pairs.t_m - 20, floor))
    wide = t_n - floor > 40
    share = (s - floor)[wide] / (t_n - floor)[wide]
    assert abs(share.mean() - 0.5) < 0.05 and abs(share.std() - 12**-0.5) < 0.03
    teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    loss, _ = loss_of(world, make(world, settings(landing="trajectory"), lambda *_: teacher), pairs)
    assert np.sum(s == t_n) > 50 and np.max(loss[s == t_n]) < 1e-11


def test_node_reuse_gives_a_pair_at_every_node_of_every_path(default_pairs):
    times = np.asarray(default_pairs.t_m).reshape(64, 17)
    assert np.all(times[:, 0] == 999)
    edges = np.asarray(paths.milestones(8))
    for k, (high, low) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = times[:, 1 + 2 * k : 3 + 2 * k]
        assert np.all((inside > low) & (inside <= high))


def test_a_pair_keeps_its_own_prompt(world):
    """Paths of two prompts do not mix: each pair is one that its prompt alone would give."""
    objective = make(world, settings())
    both = world.conditioning(2)
    other = both._replace(mean=both.mean.at[1].add(3.0))
    key = jax.random.key(0)
    produce = jax.jit(objective.produce)
    base = produce(None, world.frozen, {"conditioning": both}, key)
    moved = produce(None, world.frozen, {"conditioning": other}, key)
    np.testing.assert_array_equal(base.z_m[:17], moved.z_m[:17])
    assert np.all(np.abs(base.z_n[17:] - moved.z_n[17:]) > 1e-3)
    np.testing.assert_array_equal(
        moved.conditioning.mean[17:], jnp.tile(other.mean[1:], (17, 1, 1, 1))
    )


def test_literal_paths_are_the_paper_s(world):
    """A segment at random, t_m inside it, in one step more a segment towards the clean end."""
    times = np.asarray(literal_times(jax.random.key(0), 4000, 8, 1000))
    assert times.shape == (4000, 9) and np.all(times[:, 0] == 999)
    t_m = times[:, -1]
    segment = np.searchsorted(paths.milestones(8)[::-1], t_m, side="left") - 1
    share = np.bincount(segment, minlength=8) / 4000
    assert np.all(np.abs(share - 1 / 8) < 0.02)
    steps = np.sum(np.diff(times) < 0, axis=1)
    # The noisiest segment's single step is no step at all from 999 to 999.
    np.testing.assert_array_equal(steps[t_m < 999], 8 - segment[t_m < 999])
    for row, count in zip(times[:50], steps[:50], strict=True):
        walked = -np.diff(row)[:count]
        assert np.ptp(walked) <= 1


def test_a_single_step_leads_from_noise_to_any_time(world):
    """The first rows of the paper's ablation."""
    objective = make(world, settings(mode="single_step"))
    batch = {"conditioning": world.conditioning(2000)}
    pairs = jax.jit(objective.produce)(None, world.frozen, batch, jax.random.key(0))
    assert pairs.z_m.shape[0] == 2000
    np.testing.assert_array_equal(pairs.boundary, paths.segment_floor(pairs.t_m, 8))
    segment = np.searchsorted(paths.milestones(8)[::-1], np.asarray(pairs.t_m)) - 1
    assert np.all(np.abs(np.bincount(segment, minlength=8) / 2000 - 1 / 8) < 0.03)
    # One step back, by the same direction, is the noise that it came from: of unit variance.
    start = jnp.full_like(pairs.t_m, 999)
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[0], pairs.z_m.shape)
    guess = gaussian.x0(world.schedule, noise, start, world.guided(2000))
    expected = ddim.step(world.schedule, noise, guess, start, pairs.t_m)
    np.testing.assert_allclose(pairs.z_m, expected, atol=2e-5)


def test_the_pseudo_huber_distance(world):
    """LCM's code: mean(sqrt(error^2 + c^2) - c)."""
    c = 0.01
    square, huber = (make(world, settings(huber=value)) for value in (0.0, c))
    pairs = pairs_of(world, square, 16)
    jump = np.linspace(-0.05, 0.05, pairs.z_m.size, dtype=np.float32).reshape(pairs.z_m.shape)
    x0 = jnp.asarray(jump)
    goal = jnp.zeros_like(x0)
    error = np.asarray(square.parts.land(x0, pairs), np.float64)
    found, metrics = huber.parts.distance(x0, goal, pairs)
    expected = (np.sqrt(error**2 + c**2) - c).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["mse_z"], (error**2).mean(axis=(1, 2, 3)), rtol=1e-4)


def test_a_student_that_starts_as_the_teacher_agrees_with_it(world):
    """With no correction (LoRA's B = 0) student and teacher are one network."""
    z = jax.random.normal(jax.random.key(0), (32, *world.shape))
    t = jnp.arange(32) * 31 + 5
    conditioning = world.conditioning(32)
    np.testing.assert_array_equal(
        world.student(world.trainable(), world.frozen)(z, t, conditioning),
        world.networks.teacher(world.frozen)(z, t, conditioning),
    )


@pytest.mark.parametrize("loss_space", ["z", "x0"])
def test_one_skip_above_the_milestone_the_target_is_the_teacher_s_own(
    world, default_pairs, loss_space
):
    """A student equal to the *guided* teacher has no loss where t_n = b, and some elsewhere."""
    guided_teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    objective = make(
        world, settings(loss_space=loss_space), lambda trainable, frozen: guided_teacher
    )
    loss, metrics = loss_of(world, objective, default_pairs)
    ends = np.asarray(default_pairs.t_n == default_pairs.boundary)
    assert 30 < ends.sum() < len(ends) - 30
    assert np.max(loss[ends]) < 1e-8
    assert np.median(loss[~ends]) > 1e-7
    assert np.max(metrics["mse_z"][ends]) < 1e-11


def test_the_loss_of_the_exact_flow_vanishes_with_the_skip_to_second_order(world, default_pairs):
    """DDIM's own error over a skip is O(skip^2), so the root of the loss falls fourfold by half."""
    roots = []
    for skip in (20, 10):
        objective = make(world, settings(skip=skip), exact_student(world))
        pairs = default_pairs if skip == 20 else pairs_of(world, objective, 64)
        loss, _ = loss_of(world, objective, pairs)
        # The same pairs at every skip, whose whole skip fits above the milestone; not near time 0,
        # where sigma changes manyfold within one skip.
        full = np.asarray(pairs.t_m - 80 > pairs.boundary)
        roots.append(np.sqrt(np.mean(np.asarray(loss)[full])))
    assert roots[0] < 0.001
    assert 1.9 < np.log2(roots[0] / roots[1]) < 2.2, roots


def test_the_x0_loss_is_the_z_loss_over_the_jump_s_coefficient(world, default_pairs):
    pairs = default_pairs
    z_space = make(world, settings(loss_space="z"))
    x0_space = make(world, settings(loss_space="x0", snr_limit=5.0))
    trainable = jax.tree.map(lambda x: x + 0.1, world.trainable())
    mse_z, _ = loss_of(world, z_space, pairs, trainable)
    loss, metrics = loss_of(world, x0_space, pairs, trainable)
    np.testing.assert_allclose(metrics["mse_z"], mse_z, rtol=1e-3, atol=1e-9)
    _, k = ddim.coefficients(world.schedule, pairs.t_m, pairs.boundary)
    snr = (world.schedule.alphas / world.schedule.sigmas)[pairs.t_m] ** 2
    expected = np.minimum(snr + 1, 5) * mse_z / np.square(k[:, 0, 0, 0])
    # Close to the milestone k is small, and both sides are mostly rounding.
    far = np.asarray(pairs.t_m - pairs.boundary > 20)
    np.testing.assert_allclose(loss[far], expected[far], rtol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 0}, "segments = 0: must be at least 1"),
        ({"skip": 0}, "skip = 0: must be at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0"),
        ({"mode": "reuse"}, "mode = 'reuse': must be one of node_reuse, literal"),
        ({"nodes_per_segment": 0}, "nodes_per_segment = 0"),
        ({"loss_space": "eps"}, "loss_space = 'eps': must be one of z, x0"),
        ({"snr_limit": 0.5}, "snr_limit = 0.5: must be at least 1"),
        ({"landing": "end"}, "landing = 'end': must be one of milestone, trajectory"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SegmentConsistencySettings(**changes)


def test_settings_that_the_time_axis_cannot_hold_are_refused(world):
    with pytest.raises(ValueError, match="nodes_per_segment = 125: must be at most 124"):
        make(world, settings(nodes_per_segment=125))
    with pytest.raises(ValueError, match="1 to 999 segments"):
        make(world, settings(segments=1000))
    with pytest.raises(ValueError, match="segments = 7: must divide the 1000 times .* 5 and 8 do"):
        make(world, settings(segments=7))
