import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tlcm_jax.diffusion.prediction import eps_from_x0, predict_x0

from tlcm_jax.diffusion import ddim, gaussian
from tlcm_jax.diffusion import sampling as sampler
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.gaussian import Gaussian

SHAPE = (4, 2, 2, 1)
DATA = Gaussian(jnp.full(SHAPE, 0.7), jnp.full(SHAPE, 0.2))
NOISE = jax.random.normal(jax.random.key(3), SHAPE)


def endpoint_student(schedule):
    """The perfect distilled model: its x0 is the end of the trajectory."""

    def denoise(z, t, data):
        variance = gaussian.variance_at(schedule, data, t)
        spread = jnp.sqrt(data.variance / variance)
        end = data.mean + spread * (z - schedule.alpha(t) * data.mean)
        return eps_from_x0(schedule, z, end, t)

    return denoise


def test_the_table_of_timesteps():
    for steps in range(1, 9):
        times = student_timesteps(steps)
        assert len(times) == steps and times[0] == 999
        assert list(times) == sorted(times, reverse=True)
        assert set(times) <= set(paths.milestones(8)[:-1])
    assert student_timesteps(3) == (999, 499, 124)
    assert student_timesteps(4) == (999, 749, 499, 124)
    assert student_timesteps(8) == paths.milestones(8)[:-1]


@pytest.mark.parametrize("steps", [0, 9, -1])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}: .*1 to 8"):
        student_timesteps(steps)


def test_each_step_renoises_its_x0_with_the_key_s_own_noise(schedule):
    oracle, key, times = gaussian.denoiser(schedule), jax.random.key(5), (999, 749, 124)
    z = NOISE
    for i, t in enumerate(times):
        x0 = predict_x0(oracle, schedule, z, jnp.full(4, t), DATA)
        if i + 1 < len(times):
            fresh = jax.random.normal(jax.random.fold_in(key, i), SHAPE)
            z = schedule.diffuse(x0, fresh, jnp.full(4, times[i + 1]))
    found = jax.jit(lambda noise: sampler.sample(oracle, schedule, noise, DATA, times, key))(NOISE)
    np.testing.assert_allclose(found, x0, atol=1e-6)


def test_explicit_noises_are_those_of_the_key(schedule):
    oracle, key = gaussian.denoiser(schedule), jax.random.key(5)
    noises = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in range(3)])
    times = student_timesteps(4)
    given = sampler.sample(oracle, schedule, NOISE, DATA, times, noises=noises)
    drawn = sampler.sample(oracle, schedule, NOISE, DATA, times, key)
    np.testing.assert_allclose(given, drawn, rtol=1e-6)


def test_without_fresh_noise_it_is_ddim(schedule):
    oracle, times = gaussian.denoiser(schedule), student_timesteps(5)
    found = sampler.sample(oracle, schedule, NOISE, DATA, times, gamma=0.0)
    z = NOISE
    for t, s in zip(times, [*times[1:], None], strict=True):
        x0 = predict_x0(oracle, schedule, z, jnp.full(4, t), DATA)
        if s is not None:
            z = ddim.step(schedule, z, x0, jnp.full(4, t), jnp.full(4, s))
    np.testing.assert_allclose(found, x0, atol=1e-5)


def test_without_fresh_noise_there_is_none_at_time_0_either(schedule):
    np.testing.assert_array_equal(sampler.levels(schedule, (999, 499, 0), 0.0)[:, 2], 0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_every_gamma_keeps_the_level_s_noise(schedule, gamma):
    levels = sampler.levels(schedule, (999, 749, 499), gamma)
    for (alpha, direct, fresh), s in zip(levels, (749, 499), strict=False):
        assert alpha == schedule.alphas[s]
        np.testing.assert_allclose(np.hypot(direct, fresh), schedule.sigmas[s], rtol=1e-6)
    np.testing.assert_array_equal(levels[-1], [1, 0, 0])


def test_one_step_of_the_perfect_student_is_the_flow(schedule):
    data = Gaussian(jnp.full(SHAPE, 0.7), jnp.full(SHAPE, 0.2))
    end = sampler.sample(endpoint_student(schedule), schedule, NOISE, data, (999,))
    variance = gaussian.variance_at(schedule, data, jnp.full(4, 999))
    whitened = (NOISE - schedule.alphas[999] * data.mean) / jnp.sqrt(variance)
    np.testing.assert_allclose(
        end, data.mean + jnp.sqrt(data.variance) * whitened, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_perfect_student_samples_the_data_in_any_number_of_steps(schedule, steps):
    shape = (256, 8, 8, 1)
    data = Gaussian(jnp.full(shape, 0.7), jnp.full(shape, 0.2))
    noise_key, key = jax.random.split(jax.random.key(0))
    # z_T is not quite N(0, I): the schedule leaves alpha_T = 0.068 of the data.
    start = schedule.alphas[-1] * 0.7
    spread = np.sqrt(schedule.alphas[-1] ** 2 * 0.2 + schedule.sigmas[-1] ** 2)
    noise = start + spread * jax.random.normal(noise_key, shape)
    times = student_timesteps(steps)
    x0 = sampler.sample(endpoint_student(schedule), schedule, noise, data, times, key)
    np.testing.assert_allclose(x0.mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(x0.var(), 0.2, rtol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": (999, 499)}, "pass key or noises"),
        ({"timesteps": (499, 999), "gamma": 0.0}, "must fall strictly, inside 0 .. 999"),
        ({"timesteps": (1000,)}, r"timesteps = \(1000,\).*inside 0 .. 999"),
        ({"timesteps": ()}, "must fall strictly"),
        ({"timesteps": (999,), "gamma": 1.5}, "gamma = 1.5"),
        ({"timesteps": (999, 499), "noises": jnp.zeros((2, *SHAPE))}, "need 1 noises, got 2"),
    ],
)
def test_bad_arguments_are_refused(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler.sample(gaussian.denoiser(schedule), schedule, NOISE, DATA, **arguments)


def test_the_teacher_s_grids():
    assert sampler.teacher_timesteps(4) == (999, 749, 499, 249)
    assert sampler.teacher_timesteps(4, spacing="leading") == (751, 501, 251, 1)
    assert sampler.teacher_timesteps(25)[:2] == (999, 959)
    assert len(sampler.teacher_timesteps(30)) == 30
    with pytest.raises(ValueError, match="spacing = 'linspace'.*'trailing' and 'leading'"):
        sampler.teacher_timesteps(4, spacing="linspace")
    with pytest.raises(ValueError, match="steps = 0"):
        sampler.teacher_timesteps(0)


def test_the_teacher_converges_to_the_guided_flow(schedule):
    """DDIM is first order: four times the steps, a quarter of the error."""
    null = Gaussian(jnp.full((1, *SHAPE[1:]), -0.1), DATA.variance[:1])
    wide = Gaussian(jnp.broadcast_to(null.mean, SHAPE), DATA.variance)
    target = gaussian.extrapolate(wide, DATA, 3.0)
    exact = gaussian.flow(schedule, NOISE, jnp.full(4, 999), jnp.zeros(4, jnp.int32), target)
    oracle = gaussian.denoiser(schedule)

    def error(steps):
        end = sampler.sample_teacher(oracle, schedule, NOISE, DATA, null, steps, scale=3.0)
        return float(jnp.sqrt(jnp.mean((end - exact) ** 2)))

    coarse, fine = error(50), error(200)
    assert fine < 0.01
    assert 3.5 < coarse / fine < 4.5
