import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.noise import times as times_of
from tlcm_jax.diffusion import gaussian, sampling
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.timesteps import student_timesteps

SHAPE = (4, 2, 2, 1)
DATA = Gaussian(jnp.full(SHAPE, 0.7), jnp.full(SHAPE, 0.2))
NOISE = jax.random.normal(jax.random.key(3), SHAPE)
KEYS = jax.random.split(jax.random.key(5), 4)


def endpoint_student(process):
    """The perfect distilled model: its x0 is the end of the trajectory, where there is no noise."""

    def denoise(z, t, data):
        spread = jnp.sqrt(data.variance / gaussian.variance_at(process, data, t))
        return data.mean + spread * (z - bcast_right(process.alpha(t), z) * data.mean)

    return denoise


def all_at(process, step):
    return times_of(process, [step] * 4)


def test_each_step_renoises_its_x0_with_the_key_s_own_noise(process):
    oracle, steps = gaussian.denoiser(process), (999, 749, 124)
    z = NOISE
    for i, t in enumerate(steps):
        x0 = oracle(z, all_at(process, t), DATA)
        if i + 1 < len(steps):
            fresh = jnp.stack(
                [jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:]) for key in KEYS]
            )
            z = process.add_noise(x0, fresh, all_at(process, steps[i + 1]))
    sample = jax.jit(lambda noise: sampling.sample(oracle, process, noise, DATA, steps, KEYS))
    np.testing.assert_allclose(sample(NOISE), x0, atol=2e-6)


def test_explicit_noises_are_those_of_the_keys(sd):
    oracle = gaussian.denoiser(sd)
    noises = jnp.stack(
        [
            jnp.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:]) for key in KEYS])
            for i in range(3)
        ]
    )
    steps = student_timesteps(4)
    given = sampling.sample(oracle, sd, NOISE, DATA, steps, noises=noises)
    drawn = sampling.sample(oracle, sd, NOISE, DATA, steps, KEYS)
    np.testing.assert_allclose(given, drawn, rtol=1e-6)


def test_without_fresh_noise_it_is_the_deterministic_sampler(process):
    oracle, steps = gaussian.denoiser(process), student_timesteps(5)
    found = sampling.sample(oracle, process, NOISE, DATA, steps, gamma=0.0)
    z = NOISE
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        x0 = oracle(z, all_at(process, t), DATA)
        if s is not None:
            z = process.step(z, x0, all_at(process, t), all_at(process, s))
    np.testing.assert_allclose(found, x0, atol=1e-5)


def test_without_fresh_noise_there_is_none_at_time_0_either(process):
    np.testing.assert_array_equal(sampling.levels(process, (999, 499, 0), 0.0)[:, 2], 0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_every_gamma_keeps_the_level_s_noise(process, gamma):
    levels = sampling.levels(process, (999, 749, 499), gamma)
    for (alpha, direct, fresh), s in zip(levels, (749, 499), strict=False):
        t = times_of(process, [s])
        assert alpha == process.alpha(t)[0]
        np.testing.assert_allclose(np.hypot(direct, fresh), process.sigma(t)[0], rtol=1e-6)
    np.testing.assert_array_equal(levels[-1], [1, 0, 0])


@pytest.mark.parametrize("gamma", [0.3, 0.7])
def test_gamma_goes_down_deterministically_and_up_by_noise(process, gamma):
    """Equation (2), in two steps: `step` to s', then forward diffusion from s' to s."""
    steps, noise = (999, 600), jax.random.normal(jax.random.key(1), SHAPE)
    oracle = gaussian.denoiser(process)
    t, s, lower = (all_at(process, i) for i in (999, 600, int((1 - gamma) * 600)))
    down = process.step(NOISE, oracle(NOISE, t, DATA), t, lower)
    ratio = process.alpha(s) / process.alpha(lower)
    spread = jnp.sqrt(process.sigma(s) ** 2 - (ratio * process.sigma(lower)) ** 2)
    up = bcast_right(ratio, down) * down + bcast_right(spread, down) * noise
    found = sampling.sample(oracle, process, NOISE, DATA, steps, gamma=gamma, noises=noise[None])
    np.testing.assert_allclose(found, oracle(up, s, DATA), atol=1e-5)


def test_one_step_of_the_perfect_student_is_the_flow(process):
    end = sampling.sample(endpoint_student(process), process, NOISE, DATA, (999,))
    t = all_at(process, 999)
    variance = gaussian.variance_at(process, DATA, t)
    whitened = (NOISE - bcast_right(process.alpha(t), NOISE) * DATA.mean) / jnp.sqrt(variance)
    expected = DATA.mean + jnp.sqrt(DATA.variance) * whitened
    np.testing.assert_allclose(end, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_perfect_student_samples_the_data_in_any_number_of_steps(process, steps):
    shape = (256, 64)
    data = Gaussian(jnp.full(shape, 0.7), jnp.full(shape, 0.2))
    noise_key, key = jax.random.split(jax.random.key(0))
    # z_T is not quite N(0, I): Stable Diffusion's table leaves alpha_T = 0.068 of the data.
    start = times_of(process, [999])
    alpha, sigma = process.alpha(start)[0], process.sigma(start)[0]
    spread = np.sqrt(alpha**2 * 0.2 + sigma**2)
    noise = alpha * 0.7 + spread * jax.random.normal(noise_key, shape)
    keys = jax.random.split(key, 256)
    student = endpoint_student(process)
    x0 = sampling.sample(student, process, noise, data, student_timesteps(steps), keys)
    np.testing.assert_allclose(x0.mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(x0.var(), 0.2, rtol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": (999, 499)}, "pass keys or noises"),
        ({"timesteps": (499, 999), "gamma": 0.0}, "must fall strictly, inside 0 .. 999"),
        ({"timesteps": (1000,)}, r"timesteps = \(1000,\).*inside 0 .. 999"),
        ({"timesteps": ()}, "must fall strictly"),
        ({"timesteps": (999,), "gamma": 1.5}, "gamma = 1.5"),
        ({"timesteps": (999, 499), "noises": jnp.zeros((2, *SHAPE))}, "need 1 noises, got 2"),
    ],
)
def test_bad_arguments_are_refused(process, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample(gaussian.denoiser(process), process, NOISE, DATA, **arguments)


def test_the_teacher_converges_to_the_guided_flow(process):
    """A first-order solver: four times the steps, a quarter of the error."""
    null = Gaussian(jnp.full((1, *SHAPE[1:]), -0.1), DATA.variance[:1])
    wide = Gaussian(jnp.broadcast_to(null.mean, SHAPE), DATA.variance)
    target = gaussian.extrapolate(wide, DATA, 3.0)
    exact = gaussian.flow(process, NOISE, all_at(process, 999), all_at(process, 0), target)
    oracle = gaussian.denoiser(process)

    def error(steps):
        end = sampling.sample_teacher(
            oracle, process, NOISE, DATA, lambda data: null, steps, scale=3.0
        )
        return float(jnp.sqrt(jnp.mean((end - exact) ** 2)))

    coarse, fine = error(50), error(200)
    assert fine < 0.012
    assert 3.5 < coarse / fine < 4.5
