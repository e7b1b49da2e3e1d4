"""What a pipeline makes of a request, against diffusers' own pipelines on the same folders.

A UNet with LCM's guidance embedding is given the scale as diffusers gives it, and `prompt_2` goes
where diffusers sends it. Latents of two steps are compared, for the same noise.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

reason = "requests are compared with torch's and diffusers' pipelines"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from tests.support.tiny_pipeline import write_tiny_pipeline  # noqa: E402
from tlcm_jax.diffusion.sampling import sample  # noqa: E402
from tlcm_jax.diffusion.scheduler_config import lcm_scheduler  # noqa: E402
from tlcm_jax.diffusion.timesteps import student_timesteps  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402

PROMPTS, OTHERS = ["a red cat", "an icon"], ["ice", "a cat of red"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with LCM's UNet, read by both sides."""
    folder = tmp_path_factory.mktemp("models") / "lcm"
    pipeline = load_model(write_tiny_pipeline(folder, family="sdxl-lcm"))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(str(folder))
    scheduler = lcm_scheduler(pipeline.configs["scheduler"])
    pipe.scheduler = diffusers.LCMScheduler.from_config(scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipeline, pipe


def theirs(pipe, scale, noise, seed=0, **texts):
    first = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    again = torch.Generator().manual_seed(seed)
    fresh = torch.randn(first.shape, generator=again)[None].numpy()
    latents = pipe(
        PROMPTS,
        timesteps=list(student_timesteps(2)),
        guidance_scale=scale,
        latents=first,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **texts,
    ).images.numpy()
    return np.moveaxis(latents, 1, -1), np.moveaxis(fresh, 2, -1)


def ours(pipeline, scale, noise, fresh, **texts):
    pipeline = dataclasses.replace(pipeline, embedded_guidance=scale)
    text = pipeline.encode(PROMPTS, **texts)
    times = student_timesteps(2)
    start, fresh = jnp.asarray(noise), jnp.asarray(fresh)
    return sample(pipeline.denoiser(), pipeline.process, start, text, times, noises=fresh)


def test_the_guidance_scale_reaches_lcm_s_unet(models):
    pipeline, pipe = models
    scale = 3.0
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    expected, fresh = theirs(pipe, scale, noise)
    drawn = ours(pipeline, scale, noise, fresh)
    assert np.linalg.norm(drawn - expected) <= 1e-5 * np.linalg.norm(expected)
    other = ours(pipeline, scale + 1, noise, fresh)
    assert np.linalg.norm(other - expected) > 1e-3 * np.linalg.norm(expected)


def test_prompt_2_goes_to_the_second_text_encoder(models):
    pipeline, pipe = models
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 4), np.float32)
    expected, fresh = theirs(pipe, 8.0, noise, prompt_2=OTHERS)
    drawn = ours(pipeline, 8.0, noise, fresh, prompts_2=OTHERS)
    assert np.linalg.norm(drawn - expected) <= 1e-5 * np.linalg.norm(expected)
    same = ours(pipeline, 8.0, noise, fresh)
    assert np.linalg.norm(same - expected) > 1e-3 * np.linalg.norm(expected)
