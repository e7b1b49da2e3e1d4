"""Previews: a few prompts by the student as it stands, in the middle of its training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.evaluation.reporting.contents import ImageGrid, ImageRow
from tlcm_jax.evaluation.reporting.images import contact_sheet
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.generate import GenerationOptions, generate

PROMPTS, STEPS = 8, (2, 4)


def write_preview(
    path: Path,
    model: LatentModel,
    adapter: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    seed: int,
    gamma: float,
    timesteps: Mapping[int, Sequence[int]],
    resolution: int | None,
) -> None:
    """Writes a contact sheet of the first prompts, at 2 and 4 steps.

    Args:
      path: the PNG.
      model: the teacher.
      adapter: what is trained, scaled.
      prompts: of which the first `PROMPTS` are shown.
      seed: of the noise.
      gamma: share of fresh noise between steps.
      timesteps: the student's times by its number of steps.
      resolution: side of the images in pixels; None is the model's own.
    """
    prompts = prompts[:PROMPTS]
    options = GenerationOptions(resolution=resolution, batch_size=PROMPTS)
    rows = [
        ImageRow(
            f"{steps} steps",
            generate(model, prompts, steps, seed, adapter, gamma, options, timesteps.get(steps)),
        )
        for steps in STEPS
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(path, ImageGrid(title=path.stem, prompts=prompts, rows=rows))
