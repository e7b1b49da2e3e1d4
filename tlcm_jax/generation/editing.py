"""Images from pictures: image to image, inpainting, and drawing small to enlarge."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tlcm_jax.diffusion import samplers
from tlcm_jax.diffusion.editing import edit_timesteps
from tlcm_jax.diffusion.timesteps import STUDENT_TIMESTEPS
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.canvas import Canvas, enlarge
from tlcm_jax.generation.generate import GenerationOptions, generate_by
from tlcm_jax.io.image_size import ImageSize, Resolution

_OPTIONS = GenerationOptions()


def edit(
    model: LatentModel,
    prompts: Sequence[str],
    canvas: Canvas,
    steps: int,
    strength: float,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    gamma: float = 1.0,
    options: GenerationOptions = _OPTIONS,
    tables: Mapping[int, Sequence[int]] = STUDENT_TIMESTEPS,
    guidance_scale: float = 1.0,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Draws on pictures with a distilled model.

    Args:
      model: the student; an inpainting one (SDXL's of nine channels) is told the mask.
      prompts: n texts.
      canvas: the pictures, and masks of what may change.
      steps: 1 to 8; fewer are taken where the start leaves fewer (`diffusion.editing`).
      strength: above 0, at most 1: how far back towards noise, snapped to the student's times.
      seed: of the noise.
      lora: an adapter already scaled.
      gamma: share of fresh noise.
      options: resolution, batches, long prompts.
      tables: the student's times by its number of steps.
      guidance_scale: 1 draws without guidance.

    Raises:
      ValueError: strength, steps, or a canvas that does not fit the prompts or the model.
    """
    times = edit_timesteps(steps, strength, tables, model.process.num_train_timesteps)
    sampler = samplers.consistency(model.process, len(times), gamma, times)
    return generate_by(
        sampler, model, prompts, seed, lora, guidance_scale, options=options, canvas=canvas
    )


def upscale(
    model: LatentModel,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    resolution: Resolution,
    steps: int,
    strength: float,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    gamma: float = 1.0,
    options: GenerationOptions = _OPTIONS,
    tables: Mapping[int, Sequence[int]] = STUDENT_TIMESTEPS,
    guidance_scale: float = 1.0,
) -> UInt8[np.ndarray, "n H W 3"]:
    """The second of two stages: images enlarged, and drawn on at the larger size.

    Args:
      model: as of `edit`, which must know the larger size.
      images: one of each prompt, such as `generate` gives.
      prompts: n texts.
      resolution: of the larger images; the options' is that of the smaller.
      steps: see `edit`.
      strength: see `edit`.
      seed: of the noise, which is another than that of the first stage with the same seed.
      lora: see `edit`.
      gamma: see `edit`.
      options: see `edit`.
      tables: see `edit`.
      guidance_scale: see `edit`.
    """
    canvas = enlarge(images, model.image_size(resolution))
    second = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])
    return edit(
        model, prompts, canvas, steps, strength, second, lora, gamma,
        replace(options, resolution=resolution), tables, guidance_scale,
    )  # fmt: skip


def larger(model: LatentModel, resolution: Resolution, factor: float) -> ImageSize:
    """A size times a factor, rounded to what the model can have."""
    size = model.image_size(resolution)
    unit = size[0] // model.latent_shape(resolution)[0]
    height, width = (unit * round(side * factor / unit) for side in size)
    return ImageSize(height=height, width=width)
