"""How ComfyUI, A1111 and Forge draw as a student of Stable Diffusion is drawn.

They count noise by sigma_t / alpha_t (equation 1 of `diffusion.process`), at 1 000 times of one
schedule that all their models have, and choose times by the number of steps n:

    ComfyUI, `simple`                     t_i = 999 - floor(1000 i / n),           (1)
    A1111 and Forge, `LCM` and `Simple`   t_i = 999 - 20 floor(50 i / n),          (2)

i = 0 .. n - 1; the second because their LCM sampler knows every twentieth time alone. ComfyUI also
takes sigmas that are typed in (its node `ManualSigmas`). Both from their sources.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from tlcm_jax.diffusion.process import DiscreteVP, Process
from tlcm_jax.diffusion.scheduler_config import process_from_config
from tlcm_jax.io.image_size import ImageSize
from tlcm_jax.io.model_card import FILES, Recipe, headline

WORKFLOW = "comfyui_workflow.json"
# What these programs take for a schedule's end of zero signal.
_LEAST_ABAR = 4.8973451890853435e-08
# Times at which a sampler of share gamma of fresh noise is one of theirs.
_SAMPLERS = {1.0: ("lcm", "LCM"), 0.0: ("euler", "Euler")}
# What ComfyUI's node ModelSamplingDiscrete calls what a network predicts, and we do, if not noise.
_PREDICTS = {"v_prediction": ("v_prediction", "v"), "sample": ("x0", "x0")}


def comfyui_times(steps: int) -> tuple[int, ...]:
    """Equation (1)."""
    return tuple(999 - 1000 * i // steps for i in range(steps))


def a1111_times(steps: int, gamma: float) -> tuple[int, ...]:
    """Equation (2) for gamma 1; for gamma 0, whose sampler knows all times, equation (1)."""
    if gamma == 0:
        return comfyui_times(steps)
    return tuple(999 - 20 * (50 * i // steps) for i in range(steps))


def sigmas(process: DiscreteVP, times: Sequence[int]) -> tuple[float, ...]:
    """sigma_t / alpha_t at each time, and the 0 that sampling ends at."""
    abar = np.maximum(process.alphas_cumprod[list(times)].astype(np.float64), _LEAST_ABAR)
    return (*np.sqrt((1 - abar) / abar).tolist(), 0.0)


def _is_known(unet: Mapping[str, Any]) -> bool:
    """Whether a UNet is of a size that these programs tell models by."""
    wide = tuple(unet.get("block_out_channels", ()))[:3] == (320, 640, 1280)
    return wide and unet.get("cross_attention_dim") in (768, 1024, 2048)


def _has_their_schedule(process: Process) -> TypeGuard[DiscreteVP]:
    if not isinstance(process, DiscreteVP):
        return False
    theirs = process_from_config(
        {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "rescale_betas_zero_snr": bool(process.alphas_cumprod[-1] == 0),
            "prediction_type": process.prediction_type,
        }
    )
    ours, table = process.alphas_cumprod, getattr(theirs, "alphas_cumprod", np.zeros(0))
    return ours.shape == table.shape and np.allclose(ours, table, rtol=1e-3, atol=1e-6)


def settings_text(recipe: Recipe, product: str, process: Process, unet: Mapping[str, Any]) -> str:
    """The part of a card on programs other than diffusers, Markdown.

    Args:
      recipe: how the student was made.
      product: its form.
      process: the model's.
      unet: the config of its UNet.
    """
    if product == "lora":
        return (
            "\n## Other programs\nThis file is for diffusers alone. ComfyUI applies a part of it, "
            "leaves out the attention, and draws all the same: there, and in A1111, Forge and "
            "sd-scripts, take the product `kohya`, which diffusers reads too.\n"
        )
    if product not in ("kohya", "single-file"):
        return ""
    if not _has_their_schedule(process):
        return (
            "\n## Other programs\nThe file has the names that ComfyUI, A1111 and Forge know, but "
            "they give all models of its kind another noise schedule: use diffusers.\n"
        )
    if recipe.gamma not in _SAMPLERS:
        return (
            f"\n## Other programs\nNo sampler of ComfyUI, A1111 or Forge takes a share "
            f"{recipe.gamma:g} of fresh noise (gamma): use diffusers.\n"
        )
    caution = (
        ""
        if _is_known(unet)
        else "\nThe programs below know networks by their size, and this UNet has none of those; "
        "where one of them takes it, these settings hold.\n"
    )
    return (
        f"{caution}\n"
        + _comfyui(recipe, product, process)
        + "\n"
        + _a1111(recipe, product, process.prediction_type)
    )


def _comfyui(recipe: Recipe, product: str, process: DiscreteVP) -> str:
    sampler, _ = _SAMPLERS[recipe.gamma]
    rows = []
    for steps, times in recipe.times.items():
        simple = comfyui_times(steps) == times
        typed = ", ".join(_decimal(value) for value in sigmas(process, times))
        rows.append(f"| {steps} | {'`simple`' if simple else f'`ManualSigmas`: {typed}'} |")
    strength = ", `LoraLoaderModelOnly` with strength 1" if product == "kohya" else ""
    marked = ""
    if process.prediction_type in _PREDICTS:
        sampling, predicted = _PREDICTS[process.prediction_type]
        end = ", zsnr on" if process.alphas_cumprod[-1] == 0 else ""
        marked = f" The model predicts {predicted}: `ModelSamplingDiscrete`, `{sampling}`{end}"
        marked += (
            " (the file says so itself, too)." if recipe.sdxl and product == "single-file" else "."
        )
    return (
        f"## ComfyUI\nSampler `{sampler}`, CFG {recipe.cfg:g}{strength}; the scheduler by the "
        f"number of steps, or `SamplerCustom` with the sigmas typed in.{marked} `{WORKFLOW}` "
        f"beside this file draws in {headline(recipe)} steps: open it in ComfyUI and choose your "
        "checkpoint.\n\n"
        "| steps | scheduler |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def _a1111(recipe: Recipe, product: str, prediction_type: str) -> str:
    _, sampler = _SAMPLERS[recipe.gamma]
    _, predicted = _PREDICTS.get(prediction_type, ("", "noise"))
    if predicted == "x0" or (predicted == "v" and recipe.gamma == 1):
        return (
            "## A1111 and Forge\nTheir LCM sampler takes every model for one that predicts noise; "
            f"this one predicts {predicted}. Use ComfyUI or diffusers.\n"
        )
    right = [n for n, times in recipe.times.items() if a1111_times(n, recipe.gamma) == times]
    prompt = f", `<lora:{FILES['kohya'].removesuffix('.safetensors')}:1>` in the prompt"
    told = f"At {_listed(right)} these are the student's times. " if right else ""
    rest = "There is no place to type times in: at other numbers of steps it is called at others"
    example = next((n for n in (4, 8, *recipe.times) if n in recipe.times and n not in right), None)
    if example is not None:
        theirs, ours = a1111_times(example, recipe.gamma), recipe.times[example]
        told += f"{rest} (at {example}: {_join(theirs)} instead of {_join(ours)}).\n"
    return (
        f"## A1111 and Forge\nSampling method `{sampler}`, schedule type `Simple`, "
        f"CFG scale {recipe.cfg:g}{prompt if product == 'kohya' else ''}. {told.strip()}\n"
    )


def _listed(steps: Sequence[int]) -> str:
    *most, last = map(str, steps)
    return f"{', '.join(most)} and {last} steps" if most else f"{last} step{'s' * (last != '1')}"


def _join(times: Sequence[int]) -> str:
    return ", ".join(map(str, times))


def workflow(recipe: Recipe, product: str, process: Process, size: ImageSize) -> str | None:
    """A workflow of ComfyUI (its API form, which the editor opens too), JSON; None without one.

    Args:
      recipe: how the student was made.
      product: its form.
      process: the model's.
      size: of the images in pixels.
    """
    taken = product in ("kohya", "single-file") and recipe.gamma in _SAMPLERS
    if not taken or not _has_their_schedule(process):
        return None
    steps = headline(recipe)
    times = recipe.times[steps]
    # For a LoRA a guess, which the editor lets one choose.
    teacher = Path(recipe.teacher).name.removesuffix(".safetensors") + ".safetensors"
    checkpoint = FILES["single-file"] if product == "single-file" else teacher
    nodes: dict[str, dict[str, Any]] = {}

    def add(kind: str, **inputs: Any) -> str:
        nodes[number := str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return number

    loader = add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model = [loader, 0]
    if product == "kohya":
        lora = FILES["kohya"]
        node = add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
        model = [node, 0]
    if process.prediction_type in _PREDICTS:
        sampling, _ = _PREDICTS[process.prediction_type]
        zero = bool(process.alphas_cumprod[-1] == 0)
        node = add("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=zero)
        model = [node, 0]
    texts = [
        [add("CLIPTextEncode", clip=[loader, 1], text=text), 0]
        for text in ("a photo of a red fox in the snow", "")
    ]
    latents = add("EmptyLatentImage", width=size.width, height=size.height, batch_size=1)
    sampler = add("KSamplerSelect", sampler_name=_SAMPLERS[recipe.gamma][0])
    if comfyui_times(steps) == times:
        grid = add("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    else:
        typed = ", ".join(_decimal(value) for value in sigmas(process, times))
        grid = add("ManualSigmas", sigmas=typed)
    drawn = add(
        "SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=float(recipe.cfg),
        positive=texts[0], negative=texts[1], sampler=[sampler, 0], sigmas=[grid, 0],
        latent_image=[latents, 0],
    )  # fmt: skip
    image = add("VAEDecode", samples=[drawn, 0], vae=[loader, 2])
    add("SaveImage", images=[image, 0], filename_prefix="tlcm")
    return json.dumps(nodes, indent=2) + "\n"


def _decimal(value: float) -> str:
    """A number of seven digits without an exponent, which the node would read as two numbers."""
    digits = max(0, 6 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{digits}f}"
