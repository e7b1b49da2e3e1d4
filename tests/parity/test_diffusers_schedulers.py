"""Our processes and samplers against diffusers' schedulers, on the same network and noise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.noise import times as times_of
from tlcm_jax.diffusion import gaussian, sampling
from tlcm_jax.diffusion.gaussian import Gaussian
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.process import RectifiedFlow
from tlcm_jax.diffusion.scheduler_config import FLOWS, SCHEDULERS, process_from_config
from tlcm_jax.diffusion.timesteps import student_timesteps

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
# What users' fine-tunes of SD 2.x and SDXL have (Lin et al. 2023).
ZERO_SNR = CONFIG | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
VP = {
    "eps": CONFIG,
    "x0": CONFIG | {"prediction_type": "sample"},
    "v": CONFIG | {"prediction_type": "v_prediction"},
    "v-zero-snr": ZERO_SNR,
}
SHAPE = (3, 4, 4, 2)
MEAN_KEY, NOISE_KEY = jax.random.split(jax.random.key(0))
DATA = Gaussian(jax.random.normal(MEAN_KEY, SHAPE), jnp.full(SHAPE, 0.3))
NOISE = jax.random.normal(NOISE_KEY, SHAPE)


def raw(process, x0, z, t):
    """What a network of the process's own prediction type returns, as a tensor.

    By PyTorch's side of the table: eps and v from x0 (diffusers' `get_velocity`), the velocity of
    a flow from two points of its line.
    """
    z, x0 = (np.asarray(x, np.float64) for x in (z, x0))
    if isinstance(process, RectifiedFlow):
        prediction = (z - x0) / float(t[0])
    else:
        alpha, sigma = (float(f(t)[0]) for f in (process.alpha, process.sigma))
        eps = (z - alpha * x0) / sigma
        v = alpha * eps - sigma * x0
        prediction = {"epsilon": eps, "v_prediction": v, "sample": x0}[process.prediction_type]
    return torch.from_numpy(np.array(prediction, np.float32))


def run(scheduler, process, denoiser, noise, **step_options):
    """A diffusers pipeline's loop: the output of its last `scheduler.step`."""
    z = torch.from_numpy(np.array(noise))
    for t in scheduler.timesteps:
        times = jnp.full(noise.shape[0], int(t))
        x0 = denoiser(jnp.asarray(z.numpy()), times, DATA)
        output = scheduler.step(raw(process, x0, z.numpy(), times), t, z, **step_options)
        z = output.prev_sample
    return output


def assert_close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    assert np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)) < tolerance


def feed_noises(monkeypatch, module, noises):
    """Makes a diffusers scheduler draw the given noises, one a call."""
    queue = [torch.from_numpy(np.array(noise)) for noise in noises]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: queue.pop(0))
    return queue


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("kind", VP)
def test_alphas_cumprod(kind, beta_schedule):
    config = VP[kind] | {"beta_schedule": beta_schedule}
    ours = process_from_config(config).alphas_cumprod
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    # Equal to the bit but for the rescaled one: PyTorch's square root is its own, in the last bit.
    np.testing.assert_allclose(ours, theirs, rtol=5e-6 if kind == "v-zero-snr" else 0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [4, 25, 50])
@pytest.mark.parametrize("kind", VP)
def test_the_teacher_is_ddim(kind, spacing, steps):
    process = process_from_config(VP[kind])
    denoiser = gaussian.denoiser(process)
    null = Gaussian(jnp.zeros((1, *SHAPE[1:])), jnp.ones((1, *SHAPE[1:])))
    teacher = guided(denoiser, 8.0, lambda data: null)
    scheduler = diffusers.DDIMScheduler.from_config(VP[kind] | {"timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    assert process.grid(steps, spacing) == tuple(scheduler.timesteps.tolist())
    theirs = run(scheduler, process, teacher, NOISE).prev_sample
    ours = sampling.sample_teacher(
        denoiser, process, NOISE, DATA, lambda data: null, steps, 8.0, spacing
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        *(("eps", steps) for steps in range(1, 9)),
        ("v", 4),
        ("x0", 4),
        ("v-zero-snr", 1),
        ("v-zero-snr", 4),
    ],
)
def test_the_student_s_sampler_is_lcm_with_our_timesteps(kind, steps, monkeypatch):
    process = process_from_config(VP[kind])
    denoiser, grid = gaussian.denoiser(process), student_timesteps(steps)
    noises = jax.random.normal(jax.random.key(7), (steps - 1, *SHAPE))
    scheduler = diffusers.LCMScheduler.from_config(VP[kind])
    scheduler.set_timesteps(timesteps=list(grid))
    queue = feed_noises(monkeypatch, diffusers.schedulers.scheduling_lcm, noises)
    theirs = run(scheduler, process, denoiser, NOISE).denoised
    assert not queue
    ours = sampling.sample(denoiser, process, NOISE, DATA, grid, noises=noises)
    assert_close(ours, theirs, 2e-6)


def test_gamma_is_that_of_tcd(monkeypatch):
    process = process_from_config(CONFIG)
    denoiser, grid = gaussian.denoiser(process), student_timesteps(4)
    noises = jax.random.normal(jax.random.key(7), (3, *SHAPE))
    scheduler = diffusers.TCDScheduler.from_config(CONFIG)
    scheduler.set_timesteps(timesteps=list(grid))
    feed_noises(monkeypatch, diffusers.schedulers.scheduling_tcd, noises)
    # TCD's last step goes to time 0 instead of to x0: compare what enters it.
    z = torch.from_numpy(np.array(NOISE))
    for t in scheduler.timesteps[:-1]:
        times = jnp.full(SHAPE[0], int(t))
        x0 = denoiser(jnp.asarray(z.numpy()), times, DATA)
        z = scheduler.step(raw(process, x0, z.numpy(), times), t, z, eta=0.3).prev_sample
    theirs = denoiser(jnp.asarray(z.numpy()), jnp.full(SHAPE[0], grid[-1]), DATA)
    ours = sampling.sample(denoiser, process, NOISE, DATA, grid, noises=noises, gamma=0.3)
    assert_close(ours, theirs)


@pytest.mark.parametrize("kind", VP)
def test_x0_noise_and_velocity_are_diffusers_(kind):
    """`add_noise`, and the x0 that a step reads from a raw prediction, at both ends of time."""
    process, scheduler = (
        process_from_config(VP[kind]),
        diffusers.DDIMScheduler.from_config(VP[kind]),
    )
    scheduler.set_timesteps(1000)
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, *SHAPE), np.float32)
    for step in (0, 1, 500, 998, 999):
        t = jnp.full(SHAPE[0], step)
        tensors = torch.from_numpy(x0), torch.from_numpy(eps), torch.full((SHAPE[0],), step)
        z = scheduler.add_noise(*tensors).numpy()
        np.testing.assert_allclose(process.add_noise(*map(jnp.asarray, (x0, eps)), t), z, atol=1e-6)
        output = scheduler.step(torch.from_numpy(eps), step, torch.from_numpy(z))
        assert_close(
            process.to_x0(*map(jnp.asarray, (eps, z)), t), output.pred_original_sample, 1e-5
        )
        if kind.startswith("v"):
            v = scheduler.get_velocity(*tensors).numpy()
            np.testing.assert_allclose(process.to_x0(*map(jnp.asarray, (v, z)), t), x0, atol=1e-5)


# --- flows ---


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_s_times_are_shifted_as_diffusers_shifts_them(shift):
    """Its pipelines give their own sigmas; the scheduler's table counts from 1 / T, ours from 0."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    process, scheduler = process_from_config(config), getattr(diffusers, FLOWS[0])(shift=shift)
    train_steps = (999, 749, 499, 124)
    scheduler.set_timesteps(sigmas=[step / 999 for step in train_steps])
    ours = [process.time(step) for step in train_steps]
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), ours, rtol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy() / 1000, ours, rtol=1e-6)
    assert scheduler.sigmas[-1] == process.end == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_a_flow_s_teacher_is_euler(shift, steps):
    process, scheduler = RectifiedFlow(shift), getattr(diffusers, FLOWS[0])(shift=shift)
    denoiser, grid = gaussian.denoiser(process), process.grid(steps)
    unshifted = RectifiedFlow().grid(steps)
    scheduler.set_timesteps(sigmas=list(unshifted))
    z = torch.from_numpy(np.array(NOISE))
    for now, t in zip(grid, scheduler.timesteps, strict=True):
        times = jnp.full(SHAPE[0], now)
        x0 = denoiser(jnp.asarray(z.numpy()), times, DATA)
        z = scheduler.step(raw(process, x0, z.numpy(), times), t, z).prev_sample
    ours = sampling.sample_teacher(denoiser, process, NOISE, DATA, lambda d: d, steps, scale=1.0)
    assert_close(ours, z)


def test_a_flow_s_noise_is_diffusers_():
    process, scheduler = RectifiedFlow(3.0), getattr(diffusers, FLOWS[0])(shift=3.0)
    train_steps = [999, 500, 40]
    scheduler.set_timesteps(sigmas=[step / 999 for step in train_steps])
    x0 = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    theirs = scheduler.scale_noise(
        torch.from_numpy(x0), scheduler.timesteps, torch.from_numpy(np.array(NOISE))
    )
    ours = process.add_noise(jnp.asarray(x0), NOISE, times_of(process, train_steps))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


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
    "sdxl-v-zero-snr": {"_class_name": "EulerDiscreteScheduler", **ZERO_SNR},
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
    ours = process_from_config(config)
    table = theirs.alphas_cumprod.numpy().copy()
    if config.get("rescale_betas_zero_snr"):
        assert table[-1] == 2**-24  # diffusers' Euler divides by it; its DDIM keeps the 0, as here
        table[-1] = 0
        np.testing.assert_allclose(ours.alphas_cumprod, table, rtol=5e-6)
    else:
        np.testing.assert_array_equal(ours.alphas_cumprod, table)
    assert ours.num_train_timesteps == theirs.config.num_train_timesteps
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
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler") and name not in (*SCHEDULERS, *FLOWS)
    ]
    assert {"CogVideoXDDIMScheduler", "EDMEulerScheduler", "UnCLIPScheduler"} <= {*others}
    for name in others:
        for betas in ({}, CONFIG, {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}):
            with pytest.raises(ValueError, match=f"class {name} .*not supported"):
                process_from_config({"_class_name": name, **betas})
