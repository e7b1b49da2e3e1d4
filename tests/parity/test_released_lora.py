"""A LoRA made as the TLCM authors made theirs: their rule in PyTorch draws what this one draws.

Their release is a PEFT folder of rank 64 over 14 names, made without giving alpha, so that PEFT's
default of 8 holds and the scale is 1/8. Their rule (docs/method.md, section 5) is written out here
in torch; fresh noise is shared.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

reason = "the authors' release is made with torch, diffusers and peft"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
peft = pytest.importorskip("peft", reason=reason)

from tests.support.tiny_pipeline import write_tiny_pipeline  # noqa: E402
from tlcm_jax.diffusion.sampling import sample  # noqa: E402
from tlcm_jax.diffusion.timesteps import student_timesteps  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.io.lora_files import read_lora  # noqa: E402
from tlcm_jax.models.conditioning import Conditioning  # noqa: E402
from tlcm_jax.models.lora import scaled  # noqa: E402

BATCH = 2
MODULES = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
# The milestones of 1 to 8 steps, as published: positions in linspace(999, 0, 9).
GRID = {
    1: [0], 2: [0, 4], 3: [0, 4, 7], 4: [0, 2, 4, 7], 5: [0, 2, 4, 6, 7], 6: [0, 2, 4, 5, 6, 7],
    7: [0, 2, 3, 4, 5, 6, 7], 8: [0, 1, 2, 3, 4, 5, 6, 7],
}  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The teacher's folder, the adapter's folder and PEFT's own UNet."""
    folder = tmp_path_factory.mktemp("release")
    teacher = write_tiny_pipeline(folder / "teacher")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(str(teacher / "unet"))
    model = peft.get_peft_model(unet, peft.LoraConfig(r=64, target_modules=MODULES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(folder / "adapter"))
    return teacher, folder / "adapter", model.eval()


def published_rule(unet, schedule, noise, fresh, text, steps):
    """Denoise to x0, re-noise with fresh noise to the next milestone, decode the last x0."""
    milestones = torch.linspace(999, 0, 9, dtype=torch.float64).int().tolist()
    times = [milestones[i] for i in GRID[steps]]
    assert times == list(student_timesteps(steps))
    z = noise
    with torch.no_grad():
        for i, t in enumerate(times):
            added = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
            eps = unet(z, t, text["prompt_embeds"], added_cond_kwargs=added).sample
            alpha = schedule.alphas_cumprod[t]
            x0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
            if i + 1 < len(times):
                z = schedule.add_noise(x0, fresh[i], torch.tensor([times[i + 1]]))
    return x0.permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
def test_released_lora_samples_as_published(release):
    teacher, folder, unet = release
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 8)
    pipeline = load_model(teacher)
    adapter = read_lora(folder, pipeline.params["unet"], pipeline.lora_names)
    rng = np.random.default_rng(0)
    text = {
        "prompt_embeds": rng.standard_normal((BATCH, 8, 32), np.float32),
        "pooled": rng.standard_normal((BATCH, 16), np.float32),
        "time_ids": np.full((BATCH, 6), 32, np.float32),
    }
    noise = rng.standard_normal((8, BATCH, 8, 8, 4), np.float32)
    schedule = diffusers.DDPMScheduler.from_pretrained(str(teacher / "scheduler"))
    theirs = {key: torch.from_numpy(value) for key, value in text.items()}
    channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(noise, -1, 2)))

    conditioning = Conditioning(**{key: jnp.asarray(value) for key, value in text.items()})
    compiled = jax.jit(lambda lora, *args: pipeline.denoiser(lora=lora)(*args))

    def denoiser(*args):
        # Compiled once for all numbers of steps; `sample` itself runs step by step around it.
        with jax.disable_jit(False):
            return compiled(adapter, *args)

    for steps in GRID:
        expected = published_rule(
            unet, schedule, channels_first[0], channels_first[1:], theirs, steps
        )
        with jax.disable_jit():
            drawn = sample(
                denoiser, pipeline.process, jnp.asarray(noise[0]), conditioning,
                student_timesteps(steps), noises=jnp.asarray(noise[1:steps]),
            )  # fmt: skip
        error = np.linalg.norm(drawn - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (steps, error)
    example = (jnp.asarray(noise[0]), jnp.full(BATCH, 999), conditioning)
    eightfold = compiled(scaled(adapter, 8.0), *example)
    change = np.linalg.norm(denoiser(*example) - eightfold) / np.linalg.norm(eightfold)
    assert change > 0.1  # at a scale of 1 the latents would be others
