"""Generates images from prompts with a distilled model, or with its undistilled teacher.

    python -m tlcm_jax.sample --model PATH [--lora FILE] --prompt TEXT --steps 4 --output out.png

PATH is a diffusers pipeline folder, a single-file checkpoint, a hub id, or the workdir of a run,
whose adapter is then used. --lora may be given again; FILE:0.8 applies a LoRA with that weight, and
OWNER/NAME:FILE is one of the hub's. --style, of the same form, goes on top of a run's adapter,
whose own weight is --student_weight. --vae PATH takes another autoencoder than the model's.
--resolution 1216x832 draws so many pixels across and down, as --width 1216 --height 832 do.
Each --prompt is one image; several are written as out-0.png, out-1.png, ... in their order.

    ... --image photo.png --strength 0.5                     draws on a picture
    ... --image photo.png --mask mask.png                    anew where the mask is white
    ... --upscale 2                                          small first, then at twice the size
    ... --control PATH --control_image edges.png --control_scale 0.5     steered by a ControlNet or
        a T2I-Adapter, which its config tells apart; again for several, each with its image
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from PIL import Image

from tlcm_jax.config.model_flags import define_model_flags
from tlcm_jax.config.size_flags import define_size_flags, given_size
from tlcm_jax.config.workdir import (
    check_guidance,
    drawn_with,
    is_workdir,
    load_adapter,
    student_scales,
    trained_resolution,
    trained_times,
)
from tlcm_jax.data.prompts import warn_truncated
from tlcm_jax.diffusion.editing import describe_edit, edit_timesteps
from tlcm_jax.diffusion.timesteps import STUDENT_TIMESTEPS, student_timesteps
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.canvas import fit_canvas, read_pictures
from tlcm_jax.generation.control import WantedControl, load_controls
from tlcm_jax.generation.editing import edit, larger, upscale
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.io.files import atomic_write
from tlcm_jax.io.lora_stack import apply_loras, merge_loras
from tlcm_jax.models.adapters import concat_loras, is_adapter
from tlcm_jax.training import compilation


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    where = {"flag_values": values}
    define_model_flags(values)
    flags.DEFINE_multi_string(
        "style",
        None,
        "LoRA on top of the student, of a run's too: PATH or hub id, [:WEIGHT].",
        **where,
    )
    flags.DEFINE_float("student_weight", 1.0, "Of a run's adapter, such as 0.8.", **where)
    flags.DEFINE_multi_string("prompt", None, "What to show.", required=True, **where)
    flags.DEFINE_multi_string(
        "prompt_2", None, "The second text encoder's, one for each --prompt.", **where
    )
    flags.DEFINE_bool("long_prompts", False, "Read prompts beyond their 77th token.", **where)
    flags.DEFINE_integer("steps", None, "1 to 8 (default 4); with --teacher any (25).", **where)
    flags.DEFINE_integer("seed", 0, "Of the noise.", **where)
    flags.DEFINE_float("gamma", None, "Share of fresh noise; the run's own, or 1.", **where)
    flags.DEFINE_bool("teacher", False, "Generate with the teacher, with guidance.", **where)
    flags.DEFINE_float(
        "guidance_scale", None,
        "With --teacher (the run's own, or 8), for LCM's UNets, and for students that were "
        "distilled without guidance.", **where,
    )  # fmt: skip
    flags.DEFINE_string("negative_prompt", None, "What guidance moves away from.", **where)
    define_size_flags(values, "the run's, or the model's own")
    flags.DEFINE_string("image", None, "Picture to draw on.", **where)
    flags.DEFINE_string("mask", None, "White where --image is drawn anew; of its size.", **where)
    flags.DEFINE_float(
        "strength", None,
        "How far --image or --upscale goes back towards noise, above 0 to 1; snapped to the "
        "student's times. By default 0.5, with --mask 1, with --upscale 0.375.", **where,
    )  # fmt: skip
    flags.DEFINE_float("upscale", None, "Draw again, so many times as large.", **where)
    flags.DEFINE_multi_string(
        "control", None, "ControlNet or T2I-Adapter: folder, file or hub id.", **where
    )
    flags.DEFINE_multi_string(
        "control_image", None,
        "Of each --control; canny:FILE takes a picture's edges.", **where,
    )  # fmt: skip
    flags.DEFINE_multi_float(
        "control_scale", None, "Of each --control, or of all: 0 to 2 (default 1).", **where
    )
    flags.DEFINE_multi_float(
        "control_start", None, "Fraction of the steps from which it steers (default 0).", **where
    )
    flags.DEFINE_multi_float(
        "control_end", None, "Fraction of the steps up to which it steers (default 1).", **where
    )
    flags.DEFINE_integer("tile", 0, "Decode by tiles of so many latent pixels.", **where)
    flags.DEFINE_integer("enlarge", 1, "Write each pixel N x N times.", lower_bound=1, **where)
    flags.DEFINE_string("output", "out.png", "Image to write.", **where)


def main(arguments: Sequence[str]) -> None:
    """Generates; anything wrong ends the process with one line that says what."""
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}; quote the prompt")
        run(flags.FLAGS)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"sample: {error}")


def run(values: flags.FlagValues) -> None:
    """Does what the flags say."""
    steps = values.steps if values.steps is not None else 25 if values.teacher else 4
    if values.teacher and values.lora:
        raise ValueError("--teacher generates with the undistilled model; leave out --lora")
    if values.student_weight != 1 and (values.lora or not is_workdir(values.model)):
        raise ValueError(
            "--student_weight is of a run's adapter; of a LoRA write --lora FILE:WEIGHT"
        )
    if not values.teacher:
        student_timesteps(steps)  # before anything is loaded
    strength, said = _strength(values), ""
    tables = STUDENT_TIMESTEPS if values.lora else trained_times(values.model) or STUDENT_TIMESTEPS
    if strength is not None:
        said = describe_edit(edit_timesteps(steps, strength, tables), strength)
    pictures = read_pictures(values.image, values.mask) if values.image else None
    wanted = _wanted_controls(values)
    targets = _targets(Path(values.output), len(values.prompt))
    options = GenerationOptions(
        prompts_2=values.prompt_2,
        chunks=None if values.long_prompts else 1,
        negative_prompt=values.negative_prompt,
        resolution=given_size(values) or trained_resolution(values.model),
        tile=values.tile,
    )
    model, adapter, _ = load_with_adapter(
        values.model,
        values.lora,
        styles=values.style or (),
        weight=values.student_weight,
        adapted=not values.teacher,
        vae=values.vae,
    )
    controls, lines = load_controls(model, wanted, options.resolution)
    options = dataclasses.replace(options, controls=controls)
    for line in lines:
        print(line)
    if values.adapter is not None:
        model = model.with_text_adapter(values.adapter)
    elif not values.long_prompts:
        for tokenizer in model.tokenizers[:1]:
            warn_truncated([*values.prompt, *(values.prompt_2 or ())], tokenizer)
    if values.teacher:
        scale = drawn_with(values.model, "guidance_scale", 8.0, given=values.guidance_scale)
        images = generate_teacher(model, values.prompt, steps, scale, values.seed, options)
    else:
        model, guidance = _guided(model, values)
        gamma = drawn_with(values.model, "gamma", 1.0, given=values.gamma)
        prompts, seed = values.prompt, values.seed
        if pictures is not None and strength is not None:
            canvas, fitted = fit_canvas(*pictures, model.image_size(options.resolution))
            print(f"{values.image}: {fitted}" if fitted else values.image)
            print(said)
            images = edit(
                model, prompts, canvas, steps, strength, seed, adapter, gamma, options, tables,
                guidance,
            )  # fmt: skip
        else:
            images = generate(
                model, prompts, steps, seed, adapter, gamma, options, tables.get(steps), guidance
            )
        if values.upscale is not None and strength is not None:
            size = larger(model, options.resolution, values.upscale)
            print(f"at {size} pixels: {said}")
            images = upscale(
                model, images, prompts, size, steps, strength, seed, adapter, gamma, options,
                tables, guidance,
            )  # fmt: skip
    for target, image in zip(targets, images, strict=True):
        enlarged = image.repeat(values.enlarge, axis=0).repeat(values.enlarge, axis=1)
        form = Image.registered_extensions()[target.suffix.lower()]
        with atomic_write(target) as part:
            Image.fromarray(np.ascontiguousarray(enlarged)).save(part, format=form)
        print(target)


def _guided(model: LatentModel, values: flags.FlagValues) -> tuple[LatentModel, float]:
    """The student to draw with, and its guidance scale, 1 for none.

    Raises:
      ValueError: guidance for a student that has it distilled in.
    """
    given = values.guidance_scale
    if model.guidance_is_embedded:
        if values.negative_prompt is not None:
            raise ValueError("--negative_prompt: this model takes the scale as an input alone")
        return model if given is None else model.with_embedded_guidance(given), 1.0
    if not values.lora and (given is not None or values.negative_prompt is not None):
        check_guidance(values.model)
    if given is not None and given < 0:
        raise ValueError(f"--guidance_scale {given:g}: must be at least 0; 1 is none")
    return model, student_scales(values.model, bool(values.lora))[0] if given is None else given


def _wanted_controls(values: flags.FlagValues) -> list[WantedControl]:
    """What the flags say of control networks, their images read.

    Raises:
      ValueError: flags that do not go together, or are out of range.
      FileNotFoundError: there is no such image.
    """
    paths, images = values.control or [], values.control_image or []
    names = ("control_scale", "control_start", "control_end")
    if not paths and (stray := next((n for n in names if getattr(values, n)), None)):
        raise ValueError(f"--{stray} goes with --control PATH --control_image FILE")
    if len(paths) != len(images):
        raise ValueError(
            f"{len(paths)} --control and {len(images)} --control_image: give an image for each"
        )
    if paths and values.upscale is not None:
        raise ValueError(
            "--control is for one size; enlarge what it made with --image and a larger --resolution"
        )
    columns = []
    for name, default in zip(names, (1.0, 0.0, 1.0), strict=True):
        given = getattr(values, name) or [default]
        if len(given) not in (1, len(paths)) and paths:
            raise ValueError(f"{len(given)} --{name} for {len(paths)} --control: one each, or one")
        columns.append(given * len(paths) if len(given) == 1 else given)
    return [WantedControl.read(*wanted) for wanted in zip(paths, images, *columns, strict=True)]


def _strength(values: flags.FlagValues) -> float | None:
    """The strength that holds; None where nothing is drawn on.

    Raises:
      ValueError: flags that do not go together.
    """
    if values.mask and not values.image:
        raise ValueError("--mask goes with --image FILE, the picture that it opens")
    if values.image is None and values.upscale is None:
        if values.strength is not None:
            raise ValueError("--strength goes with --image FILE or --upscale 2")
        return None
    if values.teacher:
        raise ValueError("--image, --mask and --upscale are for students; leave out --teacher")
    if values.image and values.upscale is not None:
        raise ValueError(
            "--upscale enlarges what is drawn from the prompt; to enlarge a picture give --image "
            "and a larger --resolution"
        )
    if values.upscale is not None and not 1 < values.upscale <= 8:
        raise ValueError(f"--upscale {values.upscale:g}: must lie above 1, at most 8")
    if values.strength is not None:
        return values.strength
    return 1.0 if values.mask else 0.5 if values.image else 0.375


class AdaptedModel(NamedTuple):
    """What `--model` and `--lora` name.

    Attributes:
      model: what generates.
      adapter: of its backbone, scaled; None where there is none.
      base: the model as it is without LoRAs, which may change its text encoders too.
    """

    model: LatentModel
    adapter: Mapping[str, Any] | None
    base: LatentModel


def load_with_adapter(
    path: str,
    loras: Sequence[str] | None = None,
    *,
    styles: Sequence[str] = (),
    weight: float = 1.0,
    adapted: bool = True,
    vae: str | None = None,
    load: Callable[..., LatentModel] = load_model,
) -> AdaptedModel:
    """A model, and the adapter to generate with.

    Args:
      path: what `load_model` reads, or a workdir: its teacher, and its newest adapter.
      loras: LoRAs of any dialect, `PATH` or `PATH:WEIGHT`, added up. With a workdir they stand in
        the trained adapter's place.
      styles: LoRAs that are applied beside a workdir's adapter, or beside `loras`.
      weight: of a workdir's adapter.
      adapted: False leaves a workdir's adapter out.
      vae: as of `load_model`; by default a workdir's own.
      load: reads the model.
    """
    adapter, own = None, ()
    if is_workdir(path):
        config, trained = load_adapter(path)
        path = config["model"]["path"]
        vae = vae or config["model"].get("vae") or None
        own = config["model"].get("loras") or ()
        adapter = trained if adapted and not loras else None
    base = model = merge_loras(load(path, vae=vae), own)
    specs = [*(loras or ()), *styles]
    if adapter is not None and not is_adapter(adapter):
        if weight != 1:
            raise ValueError("--student_weight: this run trained whole weights, not an adapter")
        if specs:
            model, adapter = model.with_params(**{model.backbone: adapter}), None
    if specs:
        model, more = apply_loras(model, specs)
        adapter = more if adapter is None else concat_loras([adapter, more or {}], [weight, 1.0])
    elif adapter is not None and weight != 1:
        adapter = concat_loras([adapter], [weight])
    return AdaptedModel(model, adapter, base)


def _targets(output: Path, count: int) -> list[Path]:
    """A file for each image.

    Raises:
      ValueError: the name ends in no image format.
      FileNotFoundError: its folder does not exist.
    """
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--output {output}: give a name that ends in .png, .jpg or .webp")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: the folder {output.parent} does not exist")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells each of its options
    define_flags(flags.FLAGS)
    compilation.use_cache()
    app.run(main)
