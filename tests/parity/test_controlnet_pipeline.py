"""A student steered by control networks draws diffusers' images from the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from diffusers.schedulers import scheduling_lcm  # noqa: E402

from tests.support.controls import TINY_ADAPTER, tiny_controlnet, write_control  # noqa: E402
from tests.support.tiny_pipeline import SD_UNET, UNET, write_tiny_pipeline  # noqa: E402
from tlcm_jax.diffusion.timesteps import student_timesteps  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.generation import generate as module  # noqa: E402
from tlcm_jax.generation.control import Control  # noqa: E402
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher  # noqa: E402

PROMPTS, SEED = ["a red cat", "an icon"], 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On nets this small, PyTorch's threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two ControlNets and a T2I-Adapter."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_pipeline(folder / "sdxl")
    for seed, name in enumerate(("canny", "depth")):
        write_control(folder / name, tiny_controlnet(UNET), seed)
    write_control(folder / "sketch", TINY_ADAPTER)
    return folder


def pictures(seed):
    return np.random.default_rng(seed).integers(0, 256, (1, 32, 32, 3), np.uint8)


def noises(count):
    """What `generate` draws for the prompts: the first latents, then one for each step."""
    keys = [jax.random.fold_in(jax.random.key(SEED), i) for i in range(len(PROMPTS))]
    return [
        np.stack([jax.random.normal(jax.random.fold_in(key, i), (8, 8, 4)) for key in keys])
        for i in range(count)
    ]


def draw_theirs(pipe, monkeypatch, steps, **options):
    """Latents and images, both NHWC, by our noise."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(
        pipe.scheduler.config, original_inference_steps=8
    )
    first, *fresh = (torch.from_numpy(np.moveaxis(n, -1, 1).copy()) for n in noises(steps))
    left = list(fresh)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *args, **named: left.pop(0))
    latents = pipe(
        PROMPTS, timesteps=list(student_timesteps(steps)), guidance_scale=0.0, latents=first,
        output_type="latent", **options,
    ).images  # fmt: skip
    assert not left
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return np.moveaxis(latents.numpy(), 1, -1), np.moveaxis(images.numpy(), 1, -1) / 2 + 0.5


def draw_ours(model, controls, steps, monkeypatch):
    """Latents, images in 0 .. 1 before they are rounded, and what `generate` returns."""
    caught = []
    decode = module._decode

    def catch(static, params, latents):
        caught.append((latents, model.decode_latents(params, latents)))
        return decode(static, params, latents)

    monkeypatch.setattr(module, "_decode", catch)
    images = generate(model, PROMPTS, steps, SEED, options=GenerationOptions(controls=controls))
    ((latents, exact),) = caught
    return np.asarray(latents), np.asarray(exact), images


def assert_close(ours, theirs):
    latents, exact, images = ours
    assert np.linalg.norm(latents - theirs[0]) < 1e-5 * np.linalg.norm(theirs[0])
    assert np.abs(exact - theirs[1].clip(0, 1)).max() < 1e-4
    assert np.abs(images / 255 - theirs[1].clip(0, 1)).max() < 0.5 / 255 + 1e-4


def test_two_controlnets_with_scales_and_fractions(folder, monkeypatch):
    model = load_model(folder / "sdxl")
    networks = {name: model.load_control(folder / name) for name in ("canny", "depth")}
    settings = {"canny": (0.5, 0.0, 0.7), "depth": (1.2, 0.3, 1.0)}  # of 3 steps: 2, and 2
    controls = [
        Control(network=networks[name], images=pictures(i), scale=scale, start=start, end=end)
        for i, (name, (scale, start, end)) in enumerate(settings.items())
    ]
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        folder / "sdxl",
        controlnet=[diffusers.ControlNetModel.from_pretrained(folder / name) for name in networks],
    )
    scales, starts, ends = (list(column) for column in zip(*settings.values(), strict=True))
    theirs = draw_theirs(
        pipe, monkeypatch, 3,
        image=[torch.from_numpy(np.moveaxis(pictures(i), -1, 1) / np.float32(255)) for i in (0, 1)],
        controlnet_conditioning_scale=scales, control_guidance_start=starts,
        control_guidance_end=ends, height=32, width=32,
    )  # fmt: skip
    ours = draw_ours(model, controls, 3, monkeypatch)
    assert_close(ours, theirs)
    plain = generate(model, PROMPTS, 3, SEED)
    assert np.mean(plain != ours[2]) > 0.5


def test_an_adapter_for_a_fraction_of_the_steps(folder, monkeypatch):
    model = load_model(folder / "sdxl")
    control = Control(
        network=model.load_control(folder / "sketch"), images=pictures(2), scale=0.8, end=0.5
    )
    pipe = diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(
        folder / "sdxl", adapter=diffusers.T2IAdapter.from_pretrained(folder / "sketch")
    )
    theirs = draw_theirs(
        pipe, monkeypatch, 2,
        image=torch.from_numpy(np.moveaxis(pictures(2), -1, 1) / np.float32(255)),
        adapter_conditioning_scale=0.8, adapter_conditioning_factor=0.5, height=32, width=32,
    )  # fmt: skip
    assert_close(draw_ours(model, [control], 2, monkeypatch), theirs)


def test_the_guided_teacher_is_steered_in_both_of_its_calls(tmp_path):
    """SD 1.x; DDIM to the cleanest time, which is diffusers' with `set_alpha_to_one` false."""
    folder = write_tiny_pipeline(tmp_path / "sd", family="sd")
    path = write_control(tmp_path / "canny", tiny_controlnet(SD_UNET))
    model = load_model(folder)
    control = Control(network=model.load_control(path), images=pictures(0), scale=0.5)
    images = generate_teacher(model, PROMPTS, 2, 4.0, SEED, GenerationOptions(controls=[control]))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=diffusers.ControlNetModel.from_pretrained(path), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    first = torch.from_numpy(np.moveaxis(noises(1)[0], -1, 1).copy())
    theirs = pipe(
        PROMPTS, torch.from_numpy(np.moveaxis(pictures(0), -1, 1) / np.float32(255)),
        num_inference_steps=2, guidance_scale=4.0, latents=first, output_type="np",
        controlnet_conditioning_scale=0.5, height=32, width=32,
    ).images  # fmt: skip
    assert np.abs(images / 255 - theirs).max() < 0.5 / 255 + 1e-4


def test_a_control_image_of_each_prompt_is_that_prompt_s(folder):
    model = load_model(folder / "sdxl")
    network = model.load_control(folder / "canny")
    black, white = (np.full((1, 32, 32, 3), value, np.uint8) for value in (0, 255))

    def drawn(images):
        control = Control(network=network, images=images, scale=2.0)
        options = GenerationOptions(controls=[control], batch_size=1)
        return generate(model, PROMPTS, 1, SEED, options=options)

    each, all_black = drawn(np.concatenate([black, white])), drawn(black)
    np.testing.assert_array_equal(each[0], all_black[0])
    np.testing.assert_array_equal(each[1], drawn(white)[1])
    assert np.mean(each[1] != all_black[1]) > 0.1


def test_what_does_not_fit_is_refused_before_anything_is_drawn(folder):
    model = load_model(folder / "sdxl")
    network = model.load_control(folder / "canny")

    def refused(said, count=1, steps=2, **settings):
        with pytest.raises(ValueError, match=said):
            controls = [Control(**{"network": network, "images": pictures(0)} | settings)]
            options = GenerationOptions(controls=controls)
            generate(model, ["a cat"] * count, steps, SEED, options=options)

    refused("control scale 2.5: must lie in 0 to 2", scale=2.5)
    refused("control scale nan", scale=float("nan"))
    refused("a control from 0.5 to 0.5: give fractions", start=0.5, end=0.5)
    refused("a control from 0 to 0.5 steers none of 1 steps", steps=1, end=0.5)
    refused("2 control images for 3 prompts", count=3, images=np.repeat(pictures(0), 2, 0))
    refused(r"shape \(16, 32, 3\) for \(32, 32, 3\): fit it first", images=pictures(0)[:, :16])
    refused("control images of float32", images=pictures(0).astype(np.float32))
    with pytest.raises(ValueError, match="1 control networks, and maps for 0"):
        denoiser = model.denoiser(controls=[(network.network, network.params)])
        denoiser(jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), model.encode(["a cat"]))
