"""Drawing on pictures, against diffusers' pipelines with `LCMScheduler` on shared noise: 1e-4."""

import importlib

import jax
import numpy as np
import pytest
from PIL import Image

reason = "parity with diffusers' pipelines needs torch and diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from tests.support.tiny_pipeline import write_tiny_pipeline  # noqa: E402
from tlcm_jax.diffusion.editing import edit_timesteps  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.generation import generate as module  # noqa: E402
from tlcm_jax.generation.canvas import Canvas  # noqa: E402
from tlcm_jax.generation.editing import edit  # noqa: E402

PROMPT, SEED = "a red cat", 3
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
MASK = np.zeros((1, 32, 32), bool)
MASK[:, 6:25, 3:18] = True  # cuts through latents
PIPELINES = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["sdxl", "sdxl-inpaint"])
def folder(request, tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("m") / "tiny", family=request.param)


def noises(count):
    """Ours, as `generate` draws it for the first prompt, in PyTorch's order."""
    key = jax.random.fold_in(jax.random.key(SEED), 0)
    drawn = [jax.random.normal(jax.random.fold_in(key, i), (1, 8, 8, 4)) for i in range(count)]
    return [torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2)) for noise in drawn]


def theirs(folder, kind, monkeypatch, timesteps, strength, **pictures):
    pipe = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline").from_pretrained(
        folder, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(
        pipe.scheduler.config, original_inference_steps=8
    )
    queue = noises(len(timesteps) + 1)

    def feed(*args, **kwargs):
        return queue.pop(0)

    pipeline = importlib.import_module(PIPELINES + kind.lower())
    monkeypatch.setattr(pipeline, "randn_tensor", feed)
    scheduler = importlib.import_module("diffusers.schedulers.scheduling_lcm")
    monkeypatch.setattr(scheduler, "randn_tensor", feed)
    # The mean of the autoencoder's posterior, which is what is taken here.
    monkeypatch.setattr(
        pipeline, "retrieve_latents", lambda output, generator=None: output.latent_dist.mode()
    )
    with torch.no_grad():
        latents = pipe(
            PROMPT, timesteps=list(timesteps), strength=strength, guidance_scale=0,
            image=Image.fromarray(PICTURE[0]), output_type="latent", **pictures,
        ).images  # fmt: skip
    return latents.numpy().transpose(0, 2, 3, 1)


def ours(folder, monkeypatch, steps, strength, masks=None):
    drawn, decode = [], module._decode

    def seen(static, params, latents):
        drawn.append(np.asarray(latents))
        return decode(static, params, latents)

    monkeypatch.setattr(module, "_decode", seen)
    edit(load_model(folder), [PROMPT], Canvas(images=PICTURE, masks=masks), steps, strength, SEED)
    return drawn[0]


def assert_close(found, wanted):
    assert np.max(np.abs(found - wanted)) < 1e-4 * np.max(np.abs(wanted))


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (4, 1.0)])
def test_image_to_image(tmp_path, monkeypatch, steps, strength):
    folder = write_tiny_pipeline(tmp_path / "tiny")
    times = edit_timesteps(steps, strength)
    expected = theirs(folder, "Img2Img", monkeypatch, times, 1.0)
    assert_close(ours(folder, monkeypatch, steps, strength), expected)


# diffusers cuts the times that it is given by the strength, and with 1 begins from noise alone.
@pytest.mark.parametrize(
    ("steps", "strength", "timesteps", "their_strength"),
    [(2, 0.5, (999, 998, 499, 249), 0.5), (3, 1.0, (999, 499, 124), 1.0)],
)
def test_inpainting(folder, monkeypatch, steps, strength, timesteps, their_strength):
    assert timesteps[-steps:] == edit_timesteps(steps, strength)
    mask = Image.fromarray(np.where(MASK[0], 255, 0).astype(np.uint8))
    expected = theirs(
        folder, "Inpaint", monkeypatch, timesteps, their_strength, mask_image=mask,
        height=32, width=32,
    )  # fmt: skip
    assert_close(ours(folder, monkeypatch, steps, strength, MASK), expected)


def test_the_times_are_lcm_s_below_the_whole():
    """`LatentConsistencyModelImg2ImgPipeline`'s, on as many original steps as milestones."""
    config = {"num_train_timesteps": 1000, "original_inference_steps": 8}
    scheduler = diffusers.LCMScheduler.from_config(config)
    compared = 0
    for eighths in range(1, 8):
        for steps in range(1, eighths + 1):
            scheduler.set_timesteps(steps, strength=eighths / 8)
            expected = tuple(int(t) for t in scheduler.timesteps)
            assert edit_timesteps(steps, eighths / 8) == expected
            compared += 1
    assert compared == 28
