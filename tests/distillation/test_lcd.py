import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tlcm_jax.diffusion.prediction import eps_from_x0, predict_x0

from tlcm_jax.diffusion import ddim, gaussian
from tlcm_jax.diffusion import sampling as sampler
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.distillation import lcd as endpoints
from tlcm_jax.distillation.lcd import EndpointConsistencySettings, endpoint_consistency


def make(world, student=None, **changes):
    networks = world.networks
    if student is not None:
        networks = dataclasses.replace(networks, student=student)
    settings = EndpointConsistencySettings(guidance_scale=2.0, **changes)
    return endpoint_consistency(networks, world.schedule, world.shape, settings)


def pairs_of(world, objective, batch):
    arguments = (world.trainable(), world.frozen, {"conditioning": world.conditioning(batch)})
    return jax.jit(objective.produce)(*arguments, jax.random.key(0))


def loss_of(world, objective, pairs, trainable=None):
    return jax.jit(objective.loss)(trainable, world.frozen, pairs, jax.random.key(0))


def constant_student(world, value):
    """Sees the same x0 everywhere: the rollout's z0 is then known."""

    def student(trainable, frozen):
        return lambda z, t, c: eps_from_x0(world.schedule, z, jnp.full_like(z, value), t)

    return student


def test_the_paper_s_values_are_the_defaults():
    default = EndpointConsistencySettings()
    assert (default.segments, default.teacher_substeps, default.guidance_scale) == (8, 3, 8.0)
    assert default.rollout_timesteps == (999, 749, 499, 249)
    assert default.rollout == "renoise"
    assert default.states_per_rollout == 1


def test_states_are_rollouts_at_random_milestones(world):
    """z_m has the level's mean and noise; at 999 it is pure noise."""
    pairs = pairs_of(world, make(world, constant_student(world, 3.0)), 4000)
    falling = np.asarray(paths.milestones(8))
    t_m = np.asarray(pairs.t_m)
    np.testing.assert_array_equal(pairs.t_n, falling[np.searchsorted(-falling, -t_m) + 1])
    for t in falling[:-1]:
        here = np.asarray(pairs.z_m)[t_m == t]
        assert abs(len(here) / 4000 - 1 / 8) < 0.02
        mean, spread = (
            (0, 1) if t == 999 else (3 * world.schedule.alphas[t], world.schedule.sigmas[t])
        )
        np.testing.assert_allclose(here.mean(), mean, atol=0.1)
        np.testing.assert_allclose(here.std(), spread, atol=0.06)


@pytest.mark.parametrize("substeps", [1, 3])
def test_the_teacher_takes_equal_steps_to_the_milestone_below(world, substeps):
    pairs = pairs_of(world, make(world, teacher_substeps=substeps), 32)
    teacher = guided(gaussian.denoiser(world.schedule), 2.0, world.frozen)
    z = pairs.z_m
    for i in range(substeps):
        t = pairs.t_m - (pairs.t_m - pairs.t_n) * i // substeps
        s = pairs.t_m - (pairs.t_m - pairs.t_n) * (i + 1) // substeps
        x0 = predict_x0(teacher, world.schedule, z, t, pairs.conditioning)
        z = ddim.step(world.schedule, z, x0, t, s)
    np.testing.assert_allclose(pairs.z_n, z, atol=2e-5)


def test_the_milestone_rollout_is_the_chain_of_segment_jumps(world, monkeypatch):
    """The rollout's x0, seen on its way through the sampler, against g applied eight times."""
    seen = []

    def spy(*arguments):
        seen.append((arguments, sampler.sample(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(endpoints, "sample", spy)
    objective = make(world, rollout="milestones")
    objective.produce(
        world.trainable(), world.frozen, {"conditioning": world.conditioning(3)}, jax.random.key(0)
    )
    ((_, schedule, z, conditioning, *_), found), student = (
        seen[0],
        world.student(world.trainable(), world.frozen),
    )
    for t, s in zip(paths.milestones(8), paths.milestones(8)[1:], strict=False):
        now, then = jnp.full(3, t), jnp.full(3, s)
        x0 = predict_x0(student, schedule, z, now, conditioning)
        z = ddim.step(schedule, z, x0, now, then)
    np.testing.assert_allclose(found, x0, atol=1e-5)


@pytest.mark.parametrize("states", [2, 3, 8])
def test_states_of_one_rollout_lie_at_different_milestones(states):
    index = np.asarray(endpoints.milestone_indices(jax.random.key(0), 4000, 8, states))
    assert index.shape == (4000, states)
    assert all(len(set(row)) == states for row in index[:100])
    for column in index.T:
        assert np.all(np.abs(np.bincount(column, minlength=8) / 4000 - 1 / 8) < 0.02)


def test_states_of_one_rollout_share_its_prompt_and_not_its_noise(world):
    objective = make(world, constant_student(world, 0.0), states_per_rollout=2)
    conditioning = world.conditioning(3)
    conditioning = conditioning._replace(
        mean=conditioning.mean * jnp.arange(1.0, 4.0)[:, None, None, None]
    )
    pairs = objective.produce(
        world.trainable(), world.frozen, {"conditioning": conditioning}, jax.random.key(0)
    )
    np.testing.assert_array_equal(pairs.conditioning.mean[::2], conditioning.mean)
    np.testing.assert_array_equal(pairs.conditioning.mean[1::2], conditioning.mean)
    noise = np.asarray(pairs.z_m) / world.schedule.sigmas[pairs.t_m][:, None, None, None]
    assert np.all(np.abs(noise[::2] - noise[1::2]) > 1e-4)


def test_at_time_zero_the_target_is_the_latent_itself(world):
    objective = make(world, constant_student(world, 0.5), states_per_rollout=8)
    pairs = pairs_of(world, objective, 4)
    loss, metrics = loss_of(world, objective, pairs)
    ends = np.asarray(pairs.t_n == 0)
    assert ends.sum() == 4
    np.testing.assert_allclose(loss[~ends], 0, atol=1e-9)
    expected = np.mean(np.square(0.5 - np.asarray(pairs.z_n)[ends]), axis=(1, 2, 3))
    np.testing.assert_allclose(loss[ends], expected, rtol=1e-4)
    np.testing.assert_array_equal(metrics["mse_x0"], loss)


def test_times_are_weighed_by_the_clipped_snr(world):
    student = constant_student(world, 0.5)
    plain, weighed = (make(world, student, snr_limit=limit) for limit in (1.0, 5.0))
    pairs = pairs_of(world, plain, 16)
    (alike, _), (heavy, _) = (loss_of(world, objective, pairs) for objective in (plain, weighed))
    alphas = np.asarray(world.schedule.alphas_cumprod)[np.asarray(pairs.t_m)]
    np.testing.assert_allclose(heavy, np.minimum(1 / (1 - alphas), 5) * alike, rtol=1e-4)
    assert np.sum(np.asarray(alike) > 0) > 0


def test_the_loss_of_the_exact_endpoints_vanishes_with_the_teacher_s_step(world):
    """The exact endpoint map, judged by teachers of p and 4p sub-steps: DDIM's error is O(1/p)."""

    def student(trainable, frozen):
        def denoise(z, t, conditioning):
            end = gaussian.flow(world.schedule, z, t, jnp.zeros_like(t), world.guided(z.shape[0]))
            return eps_from_x0(world.schedule, z, end, t)

        return denoise

    roots = []
    for substeps in (16, 64):
        objective = make(world, student, teacher_substeps=substeps, states_per_rollout=8)
        pairs = pairs_of(world, objective, 32)
        loss, _ = loss_of(world, objective, pairs)
        roots.append(float(jnp.sqrt(jnp.mean(loss))))
    assert roots[1] < 0.001
    assert 3.3 < roots[0] / roots[1] < 4.7, roots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 0}, "segments = 0"),
        ({"teacher_substeps": 0}, "teacher_substeps = 0"),
        ({"rollout": "teacher"}, "rollout = 'teacher': must be one of renoise, milestones"),
        ({"states_per_rollout": 9}, "states_per_rollout = 9: must be at most 8"),
        ({"rollout_timesteps": (999, 1000)}, r"rollout_timesteps = \(999, 1000\)"),
        ({"rollout_timesteps": ()}, "rollout_timesteps"),
        ({"teacher_substeps": 125}, "teacher_substeps = 125: must be at most 124"),
        ({"segments": 7}, "segments = 7: must divide the 1000 times"),
        ({"snr_limit": 0.5}, "snr_limit = 0.5: must be at least 1"),
        ({"weight": -1.0}, "weight = -1.0: must be at least 0"),
    ],
)
def test_bad_settings_are_refused(world, changes, message):
    with pytest.raises(ValueError, match=message):
        make(world, **changes)
