import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.gaussian_world import keys
from tests.support.noise import times as times_of
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.diffusion.timesteps import milestones, segment_lower_bound
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.mlcd_pairs import paper_times
from tlcm_jax.distillation.objective import split


def settings(**changes):
    return MLCDSettings(guidance_scale=2.0, **changes)


def make(world, chosen, student=None):
    networks = world.networks
    if student is not None:
        networks = dataclasses.replace(networks, student=student)
    return chosen.build(networks)


@pytest.fixture(scope="module")
def default_pairs(world):
    """64 paths' worth of pairs by the default settings; no student has a part in them."""
    return world.pairs(make(world, settings()), 64)


@pytest.fixture(scope="module")
def any_pairs(any_world):
    """As `default_pairs`, on either process."""
    return any_world.pairs(make(any_world, settings()), 64)


def guided_teacher(world):
    return world.networks.guided_teacher(world.frozen, 2.0)


def train_steps(world, t):
    """Times as the training steps, 0 .. T-1, that they stand for."""
    t = np.asarray(t, np.float64)
    if world.process.discrete:
        return t
    shift = world.process.shift
    return 999 * t / (shift - (shift - 1) * t)


def exact_student(world):
    """Its f is the x0 whose jump ends where the guided flow meets the milestone."""

    def student(trainable, frozen):
        def denoise(z, t, conditioning):
            lower = segment_lower_bound(world.process, t, world.segments)
            end = gaussian.flow(world.process, z, t, lower, world.guided(z.shape[0]))
            return world.process.inverse_step(z, end, t, lower)

        return denoise

    return student


def test_the_paper_s_values_are_the_defaults():
    default = MLCDSettings()
    assert (default.segments, default.skip, default.guidance_scale) == (8, 20, 8.0)
    assert (default.teacher_substeps, default.solver) == (1, "ddim")
    assert (default.loss_space, default.target_time, default.target) == (
        "z",
        "milestone",
        "student",
    )
    assert (default.huber, default.effective_snr_limit) == (0.0, 1.0)


@pytest.mark.parametrize("mode", ["node_reuse", "paper"])
def test_pairs_are_two_points_of_one_teacher_trajectory(any_world, any_pairs, mode):
    world, pairs = any_world, any_pairs
    if mode == "paper":
        pairs = world.pairs(make(world, settings(mode="paper")), 64)
    assert np.all((pairs.target_time <= pairs.t_n) & (pairs.t_n < pairs.t_m))
    np.testing.assert_array_equal(
        pairs.target_time, segment_lower_bound(world.process, pairs.t_m, 8)
    )
    skipped = train_steps(world, pairs.t_m) - 20
    expected = np.maximum(skipped, train_steps(world, pairs.target_time))
    np.testing.assert_allclose(train_steps(world, pairs.t_n), expected, atol=2e-3)
    x0 = guided_teacher(world)(pairs.z_m, pairs.t_m, pairs.conditioning)
    stepped = world.process.step(pairs.z_m, x0, pairs.t_m, pairs.t_n)
    np.testing.assert_allclose(pairs.z_n, stepped, atol=2e-5)


def test_random_target_times_lie_anywhere_between_milestone_and_target(any_world):
    """Hyper-SD's s ~ U{b .. t_n}; where s = t_n the target is the teacher's latent itself."""
    world = any_world
    objective = make(world, settings(target_time="uniform"), lambda *_: guided_teacher(world))
    pairs = world.pairs(objective, 64)
    lower = np.asarray(segment_lower_bound(world.process, pairs.t_m, 8))
    s, t_n = np.asarray(pairs.target_time), np.asarray(pairs.t_n)
    assert np.all((lower <= s) & (s <= t_n))
    wide = train_steps(world, t_n) - train_steps(world, lower) > 40
    share = (s - lower)[wide] / (t_n - lower)[wide]
    assert abs(share.mean() - 0.5) < 0.05 and abs(share.std() - 12**-0.5) < 0.03
    # Drawn for each pair, not for a path.
    first = [share[np.flatnonzero(wide) // 17 == path] for path in range(64)]
    assert np.mean([np.std(row) for row in first]) > 0.2
    loss, _ = world.loss(objective, pairs)
    assert np.sum(s == t_n) > 50 and np.max(loss[s == t_n]) < 1e-11
    assert np.median(loss[s < t_n]) > 1e-8


def test_node_reuse_gives_a_pair_at_every_point_of_every_path(any_world, any_pairs):
    times = np.asarray(any_pairs.t_m).reshape(64, 17)
    assert np.all(times[:, 0] == any_world.process.start)
    edges = milestones(any_world.process, 8)
    for k, (high, low) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = times[:, 1 + 2 * k : 3 + 2 * k]
        assert np.all((inside > low) & (inside <= high))


def test_a_pair_keeps_its_own_prompt(world):
    """Paths of two prompts do not mix: each pair is one that its prompt alone would give."""
    objective = make(world, settings())
    both = world.conditioning(2)
    other = both._replace(mean=both.mean.at[1].add(3.0))
    base, moved = (world.pairs(objective, 2, batch={"conditioning": c}) for c in (both, other))
    np.testing.assert_array_equal(base.z_m[:17], moved.z_m[:17])
    assert np.all(np.abs(base.z_n[17:] - moved.z_n[17:]) > 1e-3)
    np.testing.assert_array_equal(
        moved.conditioning.mean[17:], jnp.tile(other.mean[1:], (17, 1, 1, 1))
    )


def test_the_paper_s_paths(any_world):
    """A segment at random, t_m inside it, in one step more a segment towards the clean end."""
    process = any_world.process
    times = np.asarray(paper_times(process, keys(0, 4000), 8))
    assert times.shape == (4000, 9) and np.all(times[:, 0] == process.start)
    t_m = times[:, -1]
    segment = np.searchsorted(milestones(process, 8)[::-1], t_m, side="left") - 1
    share = np.bincount(segment, minlength=8) / 4000
    assert np.all(np.abs(share - 1 / 8) < 0.02)
    steps = np.sum(np.diff(times) < 0, axis=1)
    # The noisiest segment's single step is no step at all from the start to the start.
    moves = t_m < process.start
    np.testing.assert_array_equal(steps[moves], 8 - segment[moves])
    for row, count in zip(times[:50], steps[:50], strict=True):
        walked = -np.diff(row)[:count]
        assert np.ptp(walked) <= (1 if process.discrete else 1e-6)


def test_a_single_step_leads_from_noise_to_any_time(any_world):
    """The first rows of the paper's ablation."""
    world, process = any_world, any_world.process
    pairs = world.pairs(make(world, settings(mode="one_step_state")), 2000)
    assert pairs.z_m.shape[0] == 2000
    np.testing.assert_array_equal(pairs.target_time, segment_lower_bound(process, pairs.t_m, 8))
    segment = np.searchsorted(milestones(process, 8)[::-1], np.asarray(pairs.t_m)) - 1
    assert np.all(np.abs(np.bincount(segment, minlength=8) / 2000 - 1 / 8) < 0.03)
    start = jnp.full_like(pairs.t_m, process.start)
    noise = normal(split(keys(0, 2000), 4)[0], world.shape)
    guess = gaussian.x0(process, noise, start, world.guided(2000))
    expected = process.step(noise, guess, start, pairs.t_m)
    np.testing.assert_allclose(pairs.z_m, expected, atol=2e-5)


def test_the_pseudo_huber_distance(any_world):
    """LCM's code: mean(sqrt(error^2 + c^2) - c)."""
    world, c = any_world, 0.01
    square, huber = (make(world, settings(huber=value)) for value in (0.0, c))
    pairs = world.pairs(square, 16)
    x0 = jnp.linspace(-0.05, 0.05, pairs.z_m.size).reshape(pairs.z_m.shape)
    error = np.asarray(square.jump(x0, pairs), np.float64).reshape(len(x0), -1)
    found, metrics = huber.loss(x0, jnp.zeros_like(x0), pairs)
    expected = (np.sqrt(error**2 + c**2) - c).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["mse_z"], (error**2).mean(axis=1), rtol=1e-4)


def test_a_student_that_starts_as_the_teacher_agrees_with_it(any_world):
    """With no correction (LoRA's B = 0) student and teacher are one network."""
    world = any_world
    z = jax.random.normal(jax.random.key(0), (32, *world.shape))
    t = times_of(world.process, np.arange(32) * 31 + 5)
    conditioning = world.conditioning(32)
    np.testing.assert_array_equal(
        world.student(world.trainable(), world.frozen)(z, t, conditioning),
        world.networks.teacher(world.frozen)(z, t, conditioning),
    )


@pytest.mark.parametrize("loss_space", ["z", "x0"])
def test_one_skip_above_the_milestone_the_target_is_the_teacher_s_own(
    any_world, any_pairs, loss_space
):
    """A student equal to the *guided* teacher has no loss where t_n = b, and some elsewhere."""
    objective = make(
        any_world, settings(loss_space=loss_space), lambda *_: guided_teacher(any_world)
    )
    loss, metrics = any_world.loss(objective, any_pairs)
    ends = np.asarray(any_pairs.t_n == any_pairs.target_time)
    assert 30 < ends.sum() < len(ends) - 30
    if any_world.process.discrete:
        assert np.max(loss[ends]) < 1e-8
    # Solving for x0 divides rounding by the step's k: on a table no milestone is closer than one
    # step, on a flow it may be.
    k = any_world.process.coefficients(any_pairs.t_m, any_pairs.target_time)[1]
    assert np.max((loss * jnp.square(k))[ends]) < 1e-11
    assert np.median(loss[~ends]) > (1e-7 if any_world.process.discrete else 1e-8)
    assert np.max(metrics["mse_z"][ends]) < 1e-11


def test_the_loss_of_the_exact_flow_vanishes_with_the_skip_to_second_order(any_world, any_pairs):
    """DDIM's own error over a skip is O(skip^2), so the root of the loss falls fourfold by half."""
    world, roots = any_world, []
    for skip in (20, 10):
        objective = make(world, settings(skip=skip), exact_student(world))
        pairs = any_pairs if skip == 20 else world.pairs(objective, 64)
        loss, _ = world.loss(objective, pairs)
        # The same pairs at every skip, whose whole skip fits above the milestone; not near time 0,
        # where sigma changes manyfold within one skip.
        above = train_steps(world, pairs.t_m) - train_steps(world, pairs.target_time)
        roots.append(np.sqrt(np.mean(np.asarray(loss)[above > 80])))
    assert roots[0] < 0.001
    assert 1.9 < np.log2(roots[0] / roots[1]) < 2.2, roots


def test_the_x0_loss_is_the_z_loss_over_the_jump_s_coefficient(any_world, any_pairs):
    world, process, pairs = any_world, any_world.process, any_pairs
    z_space = make(world, settings(loss_space="z"))
    x0_space = make(world, settings(loss_space="x0", snr_limit=5.0))
    trainable = jax.tree.map(lambda x: x + 0.1, world.trainable())
    mse_z, _ = world.loss(z_space, pairs, trainable)
    loss, metrics = world.loss(x0_space, pairs, trainable)
    np.testing.assert_allclose(metrics["mse_z"], mse_z, rtol=1e-3, atol=1e-9)
    _, k = process.coefficients(pairs.t_m, pairs.target_time)
    snr = np.square(process.alpha(pairs.t_m) / process.sigma(pairs.t_m))
    expected = np.minimum(snr + 1, 5) * mse_z / np.square(k)
    # Close to the milestone k is small, and both sides are mostly rounding.
    far = train_steps(world, pairs.t_m) - train_steps(world, pairs.target_time) > 20
    np.testing.assert_allclose(loss[far], expected[far], rtol=2e-3)


def test_jump_and_target_meet_at_the_target_time(any_world, any_pairs):
    """Both sides of equation (4), by the step's own formula in numpy."""
    world, process, pairs = any_world, any_world.process, any_pairs
    objective = make(world, settings())
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    student = world.student(theta, world.frozen)

    def ddim(z, t):
        x0 = np.asarray(student(z, t, pairs.conditioning), np.float64)
        alpha, sigma, alpha_b, sigma_b = (
            np.asarray(bcast_right(level(time), z), np.float64)
            for time in (t, pairs.target_time)
            for level in (process.alpha, process.sigma)
        )
        return alpha_b * x0 + sigma_b * (np.asarray(z, np.float64) - alpha * x0) / sigma

    jump = objective.jump(objective.predict(student, pairs), pairs)
    np.testing.assert_allclose(jump, ddim(pairs.z_m, pairs.t_m), atol=2e-5)
    target = np.asarray(objective.target(student, pairs))
    ends = np.asarray(pairs.t_n == pairs.target_time)
    np.testing.assert_array_equal(target[ends], pairs.z_n[ends])
    with np.errstate(all="ignore"):  # a flow's noise at its clean end
        expected = ddim(pairs.z_n, pairs.t_n)
    np.testing.assert_allclose(target[~ends], expected[~ends], atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 0}, "segments = 0: must be at least 1"),
        ({"skip": 0}, "skip = 0: must be at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0"),
        ({"mode": "reuse"}, "mode = 'reuse': must be one of node_reuse, paper"),
        ({"points_per_segment": 0}, "points_per_segment = 0"),
        ({"huber": -0.1}, "huber = -0.1: must be at least 0"),
        ({"loss_space": "eps"}, "loss_space = 'eps': must be one of z, x0"),
        ({"snr_limit": 0.5}, "snr_limit = 0.5: must be at least 1"),
        ({"target_time": "end"}, "target_time = 'end': must be one of milestone, uniform"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MLCDSettings(**changes)


def test_settings_that_the_time_axis_cannot_hold_are_refused(any_world):
    world = any_world
    with pytest.raises(ValueError, match="points_per_segment = 125: must be at most 124"):
        make(world, settings(points_per_segment=125))
    with pytest.raises(ValueError, match="1 to 999 segments"):
        make(world, settings(segments=1000))
    with pytest.raises(ValueError, match="segments = 7: must divide the 1000 times .* 5 and 8 do"):
        make(world, settings(segments=7))
