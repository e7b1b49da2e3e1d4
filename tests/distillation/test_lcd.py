import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import roles
from tests.support.gaussian_world import constant_student, keys
from tests.support.noise import times as times_of
from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion import sampling as sampler
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.diffusion.timesteps import milestone_indices, milestones
from tlcm_jax.distillation import lcd
from tlcm_jax.distillation.lcd import LCDSettings
from tlcm_jax.distillation.objective import split
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.distillation.terms.distribution_matching import DistributionMatchingSettings


def make(world, student=None, **changes):
    networks = world.networks
    if student is not None:
        networks = dataclasses.replace(networks, student=student)
    return LCDSettings(guidance_scale=2.0, **changes).build(networks)


def test_the_paper_s_values_are_the_defaults():
    default = LCDSettings()
    assert (default.segments, default.teacher_substeps, default.guidance_scale) == (8, 3, 8.0)
    assert default.rollout_timesteps == (999, 749, 499, 249)
    assert default.rollout == "renoise"
    assert (default.states_per_rollout, default.snr_limit, default.weight) == (1, 1.0, 1.0)


def test_states_are_rollouts_at_random_milestones(any_world):
    """z_m has the milestone's mean and noise; at the start it is pure noise."""
    process = any_world.process
    pairs = any_world.pairs(make(any_world, constant_student(3.0)), 4000)
    falling = milestones(process, 8)
    t_m = np.asarray(pairs.t_m)
    np.testing.assert_array_equal(pairs.t_n, falling[np.searchsorted(-falling, -t_m) + 1])
    np.testing.assert_array_equal(pairs.sample, 3.0)
    for t in falling[:-1]:
        here = np.asarray(pairs.z_m)[t_m == t]
        assert abs(len(here) / 4000 - 1 / 8) < 0.02
        alpha, sigma = (
            float(level(jnp.asarray([t]))[0]) for level in (process.alpha, process.sigma)
        )
        mean, spread = (0, 1) if t == process.start else (3 * alpha, sigma)
        np.testing.assert_allclose(here.mean(), mean, atol=0.1)
        np.testing.assert_allclose(here.std(), spread, atol=0.06)


@pytest.mark.parametrize("substeps", [1, 3])
def test_the_teacher_takes_equal_steps_to_the_milestone_below(any_world, substeps):
    world, process = any_world, any_world.process
    pairs = world.pairs(make(world, teacher_substeps=substeps), 32)
    teacher = world.networks.guided_teacher(world.frozen, 2.0)
    z, length = pairs.z_m, pairs.t_m - pairs.t_n
    for i in range(substeps):
        done, then = (
            length * k // substeps if process.discrete else length * (k / substeps)
            for k in (i, i + 1)
        )
        s = pairs.t_m - then if i + 1 < substeps else pairs.t_n
        t = pairs.t_m - done
        z = process.step(z, teacher(z, t, pairs.conditioning), t, s)
    np.testing.assert_allclose(pairs.z_n, z, atol=2e-5)


def test_the_rollout_is_the_student_s_own_sampler(any_world):
    """z0 of equation (1): the sample that `sampling.sample` draws with the same keys."""
    world = any_world
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    pairs = world.pairs(make(world), 4, trainable=theta)
    noise_keys, rollout_keys, *_ = split(keys(0, 4), 4)
    expected = sampler.sample(
        world.student(theta, world.frozen), world.process, normal(noise_keys, world.shape),
        world.conditioning(4), (999, 749, 499, 249), rollout_keys,
    )  # fmt: skip
    np.testing.assert_allclose(pairs.sample, expected, atol=1e-5)


def test_the_milestone_rollout_is_the_chain_of_segment_jumps(any_world):
    """The rollout's x0 against g applied eight times."""
    world, process = any_world, any_world.process
    pairs = world.pairs(make(world, rollout="milestones"), 3)
    z = normal(split(keys(0, 3), 4)[0], world.shape)
    student = world.student(world.trainable(), world.frozen)
    falling = times_of(process, milestone_indices(8))
    for t, s in zip(falling, falling[1:], strict=False):
        now, then = jnp.full(3, t), jnp.full(3, s)
        x0 = student(z, now, world.conditioning(3))
        z = process.step(z, x0, now, then)
    np.testing.assert_allclose(pairs.sample, x0, atol=1e-5)


@pytest.mark.parametrize("states", [2, 3, 8])
def test_states_of_one_rollout_lie_at_different_milestones(states):
    index = np.asarray(lcd.milestone_choices(keys(0, 4000), 8, states))
    assert index.shape == (4000, states)
    # Spread evenly round the time axis.
    gaps = np.diff(np.sort(index, axis=1), axis=1, append=np.sort(index, axis=1)[:, :1] + 8)
    assert gaps.min() >= 8 // states
    for column in index.T:
        assert np.all(np.abs(np.bincount(column, minlength=8) / 4000 - 1 / 8) < 0.02)


def test_states_of_one_rollout_share_its_prompt_and_not_its_noise(any_world):
    world = any_world
    objective = make(world, constant_student(0.0), states_per_rollout=2)
    conditioning = world.different(3)
    pairs = world.pairs(objective, 3, batch={"conditioning": conditioning})
    np.testing.assert_array_equal(pairs.conditioning.mean[::2], conditioning.mean)
    np.testing.assert_array_equal(pairs.conditioning.mean[1::2], conditioning.mean)
    noise = np.asarray(pairs.z_m / bcast_right(world.process.sigma(pairs.t_m), pairs.z_m))
    assert np.all(np.abs(noise[::2] - noise[1::2]) > 1e-4)


def test_at_the_end_the_target_is_the_latent_itself(any_world):
    world = any_world
    objective = make(world, constant_student(0.5), states_per_rollout=8)
    pairs = world.pairs(objective, 4)
    loss, metrics = world.loss(objective, pairs)
    ends = np.asarray(pairs.t_n == world.process.end)
    assert ends.sum() == 4
    np.testing.assert_allclose(loss[~ends], 0, atol=1e-9)
    expected = np.mean(np.square(0.5 - np.asarray(pairs.z_n)[ends]).reshape(4, -1), axis=1)
    np.testing.assert_allclose(loss[ends], expected, rtol=1e-4)
    np.testing.assert_array_equal(metrics["mse_x0"], loss)


def test_times_are_weighed_by_the_clipped_snr(any_world):
    world, process = any_world, any_world.process
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    plain, weighed, half = (
        make(world, **changes) for changes in ({}, {"snr_limit": 5.0}, {"weight": 0.5})
    )
    pairs = world.pairs(plain, 32)
    alike, heavy, light = (world.loss(o, pairs, theta)[0] for o in (plain, weighed, half))
    snr = np.square(process.alpha(pairs.t_m) / process.sigma(pairs.t_m))
    np.testing.assert_allclose(heavy, np.minimum(snr + 1, 5) * alike, rtol=1e-4)
    np.testing.assert_allclose(light, 0.5 * alike, rtol=1e-5)
    assert np.all(np.asarray(alike) > 0) and np.max(snr) > 1


def test_the_loss_of_the_exact_endpoints_vanishes_with_the_teacher_s_step(any_world):
    """The exact endpoint map, judged by teachers of p and 4p sub-steps: DDIM's error is O(1/p)."""
    world, process, roots = any_world, any_world.process, []

    def student(trainable, frozen):
        def denoise(z, t, conditioning):
            end = jnp.full_like(t, process.end)
            return gaussian.flow(process, z, t, end, world.guided(z.shape[0]))

        return denoise

    for substeps in (16, 64):
        objective = make(world, student, teacher_substeps=substeps, states_per_rollout=8)
        loss, _ = world.loss(objective, world.pairs(objective, 32))
        roots.append(float(jnp.sqrt(jnp.mean(loss))))
    assert roots[1] < 0.001
    assert 3.3 < roots[0] / roots[1] < 4.7, roots


def test_fresh_states_lie_at_other_milestones_of_the_same_sample(any_world):
    """What auxiliary networks are shown: equation (2) drawn again."""
    world, process = any_world, any_world.process
    objective = make(world, constant_student(3.0))
    pairs = world.pairs(objective, 4000)
    fresh = objective.renoise(pairs, keys(5, 4000))
    np.testing.assert_array_equal(fresh.sample, pairs.sample)
    assert abs(np.mean(np.asarray(fresh.t_m == pairs.t_m)) - 1 / 8) < 0.02
    assert not np.any(np.asarray(fresh.z_m == pairs.z_m))
    alpha, sigma = (
        bcast_right(jnp.where(fresh.t_m == process.start, pure, level(fresh.t_m)), fresh.z_m)
        for level, pure in ((process.alpha, 0.0), (process.sigma, 1.0))
    )
    noise = (fresh.z_m - 3.0 * alpha) / sigma
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 0}, "segments = 0"),
        ({"teacher_substeps": 0}, "teacher_substeps = 0"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0"),
        ({"rollout": "teacher"}, "rollout = 'teacher': must be one of renoise, milestones"),
        ({"states_per_rollout": 0}, "states_per_rollout = 0: must be at least 1"),
        ({"states_per_rollout": 9}, "states_per_rollout = 9: must be at most 8"),
        ({"rollout_timesteps": (999, 1000)}, r"rollout_timesteps = \(999, 1000\)"),
        ({"rollout_timesteps": ()}, "rollout_timesteps"),
        ({"teacher_substeps": 125}, "teacher_substeps = 125: must be at most 124"),
        ({"segments": 7}, "segments = 7: must divide the 1000 times"),
        ({"snr_limit": 0.5}, "snr_limit = 0.5: must be at least 1"),
        ({"weight": -1.0}, "weight = -1.0: must be at least 0"),
        ({"rollout_gamma": 1.5}, "rollout_gamma = 1.5: must be at most 1"),
    ],
)
def test_bad_settings_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        LCDSettings(**{"guidance_scale": 2.0, **changes}).build(world.networks)


# The sampler's own states.


def test_visited_states_are_the_sampler_s_and_lead_to_each_other(any_world):
    world, process, times = any_world, any_world.process, (999, 749, 499, 249)
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    objective = make(world, states="visited", states_per_rollout=4)
    pairs = world.pairs(objective, 3, trainable=theta)
    plain = world.pairs(make(world), 3, trainable=theta)
    np.testing.assert_allclose(pairs.sample[::4], plain.sample, atol=1e-6)

    falling = np.asarray(milestones(process, 8))
    order = np.argsort(-np.asarray(pairs.t_m).reshape(3, 4), axis=1)

    def sorted_by_time(leaf):
        leaf = np.asarray(leaf).reshape(3, 4, *leaf.shape[1:])
        return np.stack([rows[place] for rows, place in zip(leaf, order, strict=True)])

    t_m, t_n, then = (sorted_by_time(x) for x in (pairs.t_m, pairs.t_n, pairs.next_time))
    np.testing.assert_array_equal(t_m, [times_of(process, times)] * 3)
    np.testing.assert_array_equal(t_n, falling[np.searchsorted(-falling, -t_m) + 1])
    np.testing.assert_array_equal(then, [[*times_of(process, times)[1:], process.end]] * 3)
    z_m, after = sorted_by_time(pairs.z_m), sorted_by_time(pairs.next_state)
    np.testing.assert_array_equal(after[:, :-1], z_m[:, 1:])
    np.testing.assert_array_equal(after[:, -1], pairs.sample[::4])
    np.testing.assert_array_equal(z_m[:, 0], normal(split(keys(0, 3), 4)[0], world.shape))
    # Each from the prediction at the state before: what is left is unit noise, and none at the end.
    student = jax.jit(world.student(theta, world.frozen))
    x0 = sorted_by_time(student(*pairs[:2], pairs.conditioning))
    s, made = jnp.asarray(then[0, :3]), jnp.asarray(x0[:, :3])
    noise = after[:, :3] - bcast_right(process.alpha(s), made[0]) * made
    noise = noise / bcast_right(process.sigma(s), made[0])
    assert 0.5 < noise.std() < 1.5
    np.testing.assert_allclose(after[:, 3], x0[:, 3], atol=1e-5)


def test_without_fresh_noise_the_states_are_the_deterministic_trajectory(any_world):
    """TDM's: each state by the deterministic step from the one before; auxiliary networks too."""
    world, process, times = any_world, any_world.process, (999, 749, 499, 124)
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    objective = make(
        world, states="visited", states_per_rollout=4, rollout_timesteps=times, rollout_gamma=0.0,
        weight=0.0,
    )  # fmt: skip
    assert objective.has_next_time and not objective.has_next_state
    pairs = world.pairs(objective, 3, trainable=theta)
    student = world.student(theta, world.frozen)
    x0 = student(pairs.z_m, pairs.t_m, pairs.conditioning)
    ends = pairs.next_time == process.end
    step = process.step(pairs.z_m, x0, pairs.t_m, pairs.next_time)
    expected = jnp.where(bcast_right(ends, x0), x0, step)
    np.testing.assert_allclose(pairs.next_state, expected, atol=1e-5)
    assert ends.sum() == 3 and objective.renoise(pairs, keys(1, 12)) is pairs


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_visited_states_have_the_teacher_s_step_as_others_have(world, weight):
    pairs = world.pairs(make(world, states="visited", weight=weight), 8)
    assert pairs.z_n.shape == pairs.next_state.shape == (8, *world.shape)
    moved = np.any(np.asarray(pairs.z_n) != np.asarray(pairs.z_m))
    assert moved == (weight > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": "own"}, "states = 'own': must be one of renoised, visited"),
        ({"rollout": "milestones", "states": "visited"}, "those of rollout = 'renoise'"),
        ({"states": "visited", "states_per_rollout": 5}, "the number of rollout_timesteps"),
        (
            {"states": "visited", "rollout_timesteps": (999, 500)},
            "must be among the milestones 999, 874",
        ),
    ],
)
def test_visited_states_that_cannot_be_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        make(world, **changes)


# In the square's place.


def test_a_term_can_stand_in_the_square_s_place(world):
    """LogCD's latent LPIPS; the square stays as a metric."""
    theta = jax.tree.map(lambda x: x + 0.1, world.trainable())
    square, alone = (
        StageLoss(make(world, distance=distance), {"latent_lpips": roles.latent_lpips()})
        for distance in ("square", "none")
    )
    pairs = world.pairs(square.objective, 8)
    frozen = roles.frozen_of(world, square.terms)
    (both, of_both), (one, of_one) = (
        loss(theta, frozen, pairs, keys(0, 8), {}) for loss in (square, alone)
    )
    np.testing.assert_allclose(of_one["mse_x0"], of_both["mse_x0"])
    np.testing.assert_allclose(one, of_one["latent_lpips/loss"], rtol=1e-6)
    np.testing.assert_allclose(both, one + of_one["mse_x0"], rtol=1e-5)
    assert not np.any(np.asarray(of_one["consistency/grad_norm"]))


def test_the_square_s_place_is_not_left_empty(world):
    objective = make(world, distance="none")
    with pytest.raises(ValueError, match="distance = 'none': no term compares with the target"):
        StageLoss(objective)
    held = {"latent_lpips": roles.latent_lpips(), "preference": roles.preference(world)}
    with pytest.raises(ValueError, match="which preference is held against"):
        StageLoss(objective, held)
    with pytest.raises(ValueError, match="distance = 'l1': must be one of square, none"):
        make(world, distance="l1")


def test_terms_of_the_sampler_s_own_steps_are_told_what_they_need(world):
    settings = DistributionMatchingSettings(noised="state")
    along = {"distribution_matching": roles.matching(world, settings)}
    with pytest.raises(ValueError, match="segments of the student's own trajectory: take"):
        StageLoss(make(world), along)
    StageLoss(make(world, states="visited", rollout_gamma=0.0), along)
