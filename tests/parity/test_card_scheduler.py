"""The scheduler that a card names draws as the student is sampled: the card's own line is run."""

import sys
import types

import numpy as np
import pytest

from tlcm_jax.io.model_card import Recipe, model_card

torch = pytest.importorskip("torch", reason="parity with PyTorch: torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="parity: diffusers is not installed")

TIMES = (999, 749, 499, 124)
# Of a Stable Diffusion folder.
TEACHER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
NOISE, *FRESH = np.random.default_rng(0).normal(size=(4, 2, 4, 8, 8))


def network(z, t):
    """Some epsilon, in float64."""
    return np.tanh(0.7 * z[:, ::-1] + t / 1000)


def expected(gamma):
    """x0 of the last time, by `z_s = alpha_s x0 + sigma_s e`, e the network's or fresh."""
    z = NOISE
    for i, t in enumerate(TIMES):
        eps = network(z, t)
        x0 = (z - np.sqrt(1 - BARS[t]) * eps) / np.sqrt(BARS[t])
        if i + 1 < len(TIMES):
            bar, noise = BARS[TIMES[i + 1]], eps if gamma == 0 else FRESH[i]
            z = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * noise
    return x0


@pytest.mark.parametrize(
    ("gamma", "tolerance"),
    [(0.0, 1e-5), (1.0, 1e-5), (0.4, None)],
    ids=["no noise", "all of it", "some"],
)
def test_the_scheduler_is_the_sampler(gamma, tolerance, monkeypatch):
    card = model_card(
        Recipe(name="x", teacher="x", method="TLCM", times={4: TIMES}, gamma=gamma), "lora"
    )
    (line,) = (line for line in card.splitlines() if line.startswith("pipe.scheduler ="))
    pipe = types.SimpleNamespace(scheduler=diffusers.DDIMScheduler.from_config(TEACHER))
    name = line.removeprefix("pipe.scheduler = ").split(".")[0]
    exec(line, {name: getattr(diffusers, name), "pipe": pipe})
    scheduler = pipe.scheduler
    scheduler.set_timesteps(timesteps=list(TIMES))
    queue = [torch.from_numpy(noise) for noise in FRESH]
    where = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(where, "randn_tensor", lambda *_, **__: queue.pop(0))
    options = {"eta": gamma} if f"eta={gamma:g}," in card else {}
    z = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(z, t).numpy()
        z = scheduler.step(torch.from_numpy(network(seen, float(t))), t, z, **options).prev_sample
    if tolerance is None:  # what the card calls a trace of noise
        assert options and torch.isfinite(z).all()
        return
    error = np.linalg.norm(z.numpy() - expected(gamma)) / np.linalg.norm(expected(gamma))
    assert error < tolerance
