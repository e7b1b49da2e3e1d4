"""Previews: a few prompts drawn by the student as it stands, every so many training steps."""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from tlcm_jax.config.schema import Settings
from tlcm_jax.data.prompts import read_prompts
from tlcm_jax.evaluation.reporting.contents import PictureGrid, PictureRow
from tlcm_jax.evaluation.reporting.pictures import contact_sheet
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.generate import GenerationOptions, generate
from tlcm_jax.models import lora
from tlcm_jax.training.checkpoints import Position
from tlcm_jax.training.loop import Hook
from tlcm_jax.training.state import TrainState

FOLDER = "samples"
PROMPTS, STEPS = 8, (2, 4)


def preview_hooks(settings: Settings, model: LatentModel, workdir: str | Path) -> Sequence[Hook]:
    """A hook that writes `samples/NUMBER.png`, the first prompts at 2 and 4 steps.

    The prompts are the first of the evaluation's, or of the training's where there is none.

    Args:
      settings: the recipe; none where its `sample_every` is 0.
      model: the teacher.
      workdir: the run's folder.
    """
    if not settings.sample_every:
        return ()
    if jax.process_count() > 1:
        logging.warning("sample_every: previews are drawn by runs of one process only")
        return ()
    chosen = settings.evaluation
    prompts = read_prompts(settings.prompts if chosen is None else chosen.prompts)[:PROMPTS]
    gamma = 1.0 if chosen is None else chosen.gamma
    options = GenerationOptions(resolution=settings.model.resolution or None, batch_size=PROMPTS)

    def draw(position: Position, state: TrainState) -> None:
        adapter = lora.scaled(state.trained, settings.adapter.scale)
        rows = tuple(
            PictureRow(
                kind="student",
                label=f"{steps} steps",
                pictures=generate(model, prompts, steps, settings.seed, adapter, gamma, options),
            )
            for steps in STEPS
        )
        path = Path(workdir) / FOLDER / f"{position.total:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(path, PictureGrid(title=path.stem, prompts=tuple(prompts), rows=rows))

    return (Hook(every=settings.sample_every, call=draw),)
