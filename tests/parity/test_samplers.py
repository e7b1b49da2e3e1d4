"""Every few-step sampler against diffusers' scheduler of its name, same network and noise.

With the closed-form denoiser of Gaussian data as the network. Tolerance: 1e-5 of the largest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.test_diffusers_schedulers import (
    CONFIG,
    DATA,
    NOISE,
    SHAPE,
    VP,
    assert_close,
    feed_noises,
    raw,
)
from tlcm_jax.diffusion import gaussian, samplers, sampling
from tlcm_jax.diffusion.process import RectifiedFlow
from tlcm_jax.diffusion.scheduler_config import process_from_config

torch = pytest.importorskip("torch", reason="parity with PyTorch: torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="parity: diffusers is not installed")

TRAILING = {"timestep_spacing": "trailing"}
# Name -> diffusers' class, its config besides, options of a step, ours.
PAIRS = {
    "lcm": ("LCMScheduler", {}, {}, samplers.lcm),
    "tcd": ("TCDScheduler", {}, {"eta": 0.3}, samplers.tcd),
    "tcd, all fresh": ("TCDScheduler", {}, {"eta": 1.0}, lambda p, n: samplers.tcd(p, n, 1.0)),
    "ddim": ("DDIMScheduler", TRAILING, {}, samplers.ddim),
    "euler": ("EulerDiscreteScheduler", TRAILING, {}, samplers.euler),
    "euler_ancestral": (
        "EulerAncestralDiscreteScheduler", TRAILING, {}, samplers.euler_ancestral,
    ),
}  # fmt: skip
NOISES = jax.random.normal(jax.random.key(7), (8, *SHAPE))


def ours(sampler, process) -> jax.Array:
    denoiser, z = gaussian.denoiser(process), sampler.first * NOISE
    for t, level, xi in zip(sampler.timesteps, sampler.levels, NOISES, strict=False):
        z = sampling.student_step(
            denoiser, process, z, jnp.asarray(t), jnp.asarray(level, jnp.float32), xi, DATA
        )
    return z


def theirs(name: str, process, kind: str, steps: int, monkeypatch) -> np.ndarray:
    cls, more, options, _ = PAIRS[name]
    scheduler = getattr(diffusers, cls).from_config(VP[kind] | more)
    scheduler.set_timesteps(steps)
    module = __import__(cls_module(cls), fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        feed_noises(monkeypatch, module, NOISES)
    denoiser = gaussian.denoiser(process)
    z = torch.from_numpy(np.array(NOISE)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        times = jnp.full(SHAPE[0], int(t))
        scaled = scheduler.scale_model_input(z, t)
        x0 = denoiser(jnp.asarray(scaled.numpy()), times, DATA)
        output = scheduler.step(raw(process, x0, scaled.numpy(), times), t, z, **options)
        z = output.prev_sample
    return z.numpy()


def cls_module(cls: str) -> str:
    return getattr(diffusers, cls).__module__


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_samplers_are_diffusers_(name, kind, steps, monkeypatch):
    if (name, kind) == ("euler_ancestral", "x0"):
        pytest.skip("diffusers' own scheduler has no x0 prediction")
    process = process_from_config(VP[kind])
    sampler = PAIRS[name][3](process, steps)
    assert_close(ours(sampler, process), theirs(name, process, kind, steps, monkeypatch))


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("name", PAIRS)
def test_the_times_are_diffusers_(name, steps):
    cls, more, _, build = PAIRS[name]
    scheduler = getattr(diffusers, cls).from_config(CONFIG | more)
    scheduler.set_timesteps(steps)
    found = build(process_from_config(CONFIG), steps)
    assert found.timesteps == tuple(int(t) for t in scheduler.timesteps)
    assert found.steps == steps


def test_given_times_are_taken():
    """DMD2 samples by LCM's rule at times of its own."""
    process = process_from_config(CONFIG)
    assert samplers.lcm(process, 4, (999, 749, 499, 249)).timesteps == (999, 749, 499, 249)


def test_what_cannot_be_sampled_is_refused():
    process = process_from_config(CONFIG)
    with pytest.raises(ValueError, match="steps = 51: this sampler takes 1 to 50"):
        samplers.lcm(process, 51)
    with pytest.raises(ValueError, match="gamma = 1.5"):
        samplers.tcd(process, 4, 1.5)
    with pytest.raises(ValueError, match="end in pure noise: ddim"):
        samplers.euler(RectifiedFlow(), 4)
    assert samplers.ddim(RectifiedFlow(), 4).steps == 4
