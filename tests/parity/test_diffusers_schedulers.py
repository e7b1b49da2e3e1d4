"""Our schedule and samplers against diffusers' schedulers, on the same network and noise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.diffusion import gaussian
from tlcm_jax.diffusion import sampling as sampler
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.process import SCHEDULERS, NoiseSchedule

torch = pytest.importorskip("torch", reason="parity with PyTorch: torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="parity: diffusers is not installed")

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHAPE = (3, 4, 4, 2)


@pytest.fixture(scope="module")
def world():
    """A schedule, a denoiser with its conditioning, and noise."""
    schedule = NoiseSchedule.from_config(CONFIG)
    mean_key, noise_key = jax.random.split(jax.random.key(0))
    data = Gaussian(jax.random.normal(mean_key, SHAPE), jnp.full(SHAPE, 0.3))
    noise = jax.random.normal(noise_key, SHAPE)
    return schedule, gaussian.denoiser(schedule), data, noise


def run(scheduler, denoiser, conditioning, noise, **step_options):
    """A diffusers pipeline's loop: the output of its last `scheduler.step`."""
    z = torch.from_numpy(np.array(noise))
    for t in scheduler.timesteps:
        times = jnp.full(noise.shape[0], int(t))
        eps = denoiser(jnp.asarray(z.numpy()), times, conditioning)
        output = scheduler.step(torch.from_numpy(np.array(eps)), t, z, **step_options)
        z = output.prev_sample
    return output


def feed_noises(monkeypatch, module, noises):
    """Makes a diffusers scheduler draw the given noises, one a call."""
    queue = [torch.from_numpy(np.array(noise)) for noise in noises]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: queue.pop(0))
    return queue


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_alphas_cumprod(beta_schedule):
    config = CONFIG | {"beta_schedule": beta_schedule}
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [4, 25, 50])
def test_the_teacher_is_ddim(world, spacing, steps):
    schedule, denoiser, data, noise = world
    null = Gaussian(jnp.zeros((1, *SHAPE[1:])), jnp.ones((1, *SHAPE[1:])))
    scheduler = diffusers.DDIMScheduler.from_config(CONFIG | {"timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    assert sampler.teacher_timesteps(steps, spacing=spacing) == tuple(scheduler.timesteps.tolist())
    theirs = run(scheduler, guided(denoiser, 8.0, null), data, noise).prev_sample.numpy()
    ours = sampler.sample_teacher(denoiser, schedule, noise, data, null, steps, 8.0, spacing)
    assert np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)) < 1e-5


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_student_s_sampler_is_lcm_with_our_timesteps(world, steps, monkeypatch):
    schedule, denoiser, data, noise = world
    times = student_timesteps(steps)
    noises = jax.random.normal(jax.random.key(7), (steps - 1, *SHAPE))
    scheduler = diffusers.LCMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(timesteps=list(times))
    queue = feed_noises(monkeypatch, diffusers.schedulers.scheduling_lcm, noises)
    theirs = run(scheduler, denoiser, data, noise).denoised.numpy()
    assert not queue
    ours = sampler.sample(denoiser, schedule, noise, data, times, noises=noises)
    assert np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)) < 2e-6


def test_gamma_is_that_of_tcd(world, monkeypatch):
    schedule, denoiser, data, noise = world
    times = student_timesteps(4)
    noises = jax.random.normal(jax.random.key(7), (3, *SHAPE))
    scheduler = diffusers.TCDScheduler.from_config(CONFIG)
    scheduler.set_timesteps(timesteps=list(times))
    feed_noises(monkeypatch, diffusers.schedulers.scheduling_tcd, noises)
    # TCD's last step goes to time 0 instead of to x0: compare what enters it.
    z = torch.from_numpy(np.array(noise))
    for t in scheduler.timesteps[:-1]:
        eps = denoiser(jnp.asarray(z.numpy()), jnp.full(SHAPE[0], int(t)), data)
        z = scheduler.step(torch.from_numpy(np.array(eps)), t, z, eta=0.3).prev_sample
    alpha, sigma = schedule.alphas[times[-1]], schedule.sigmas[times[-1]]
    eps = denoiser(jnp.asarray(z.numpy()), jnp.full(SHAPE[0], times[-1]), data)
    theirs = (z.numpy() - sigma * np.asarray(eps)) / alpha
    ours = sampler.sample(denoiser, schedule, noise, data, times, noises=noises, gamma=0.3)
    assert np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)) < 1e-5


# What the scheduler folders on the hub say of the noise: SD 1.x, SD 2.1 (v), SDXL base, LCM-SDXL
# students, SDXL Turbo, and models trained by the DDPM scripts.
HUB = {
    "sd-1.5": {"_class_name": "PNDMScheduler", **CONFIG, "skip_prk_steps": True},
    "sd-2.1-v": {"_class_name": "DDIMScheduler", **CONFIG, "prediction_type": "v_prediction"},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler", **CONFIG, "interpolation_type": "linear",
        "timestep_spacing": "leading", "use_karras_sigmas": False, "trained_betas": None,
    },
    "lcm-sdxl": {"_class_name": "LCMScheduler", **CONFIG, "original_inference_steps": 50},
    "sdxl-turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler", **CONFIG, "timestep_spacing": "trailing",
    },
    "sd-2.1-dpm": {
        "_class_name": "DPMSolverMultistepScheduler", **CONFIG, "solver_order": 2,
        "rescale_betas_zero_snr": False, "prediction_type": "v_prediction",
    },
    "ddpm": {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "clip_sample": False},
    "trained": {
        "_class_name": "DDPMScheduler", "num_train_timesteps": 50,
        "trained_betas": np.linspace(0.001, 0.2, 50).tolist(), "clip_sample": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_noise_levels_of_hub_configs(name):
    config = HUB[name]
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    ours = NoiseSchedule.from_config(config)
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert ours.train_steps == theirs.config.num_train_timesteps
    assert ours.prediction_type == theirs.config.prediction_type


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_silent_config_has_its_class_s_defaults(name):
    theirs = getattr(diffusers, name)
    if getattr(theirs, "_backends", ["torch"]) != ["torch"]:
        pytest.skip(f"{name} needs {theirs._backends}")
    arguments = inspect.signature(theirs.__init__).parameters
    assert SCHEDULERS[name] == tuple(
        arguments[key].default for key in ("beta_start", "beta_end", "beta_schedule")
    )
    assert arguments["prediction_type"].default == "epsilon"


def test_every_other_class_is_refused_by_name():
    """Whatever else diffusers has: none of its schedulers is read by a rule that is not its own."""
    others = [
        name for name in dir(diffusers) if name.endswith("Scheduler") and name not in SCHEDULERS
    ]
    assert {"CogVideoXDDIMScheduler", "EDMEulerScheduler", "UnCLIPScheduler"} <= {*others}
    for name in others:
        for betas in ({}, CONFIG, {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}):
            with pytest.raises(ValueError, match=f"class {name} .*not supported"):
                NoiseSchedule.from_config({"_class_name": name, **betas})
