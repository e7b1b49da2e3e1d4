"""Previews: a few prompts by the student as it stands, in the middle of its training."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.evaluation import health
from tlcm_jax.evaluation.reporting.contents import ImageGrid, ImageRow
from tlcm_jax.evaluation.reporting.images import contact_sheet
from tlcm_jax.evaluation.results import REFERENCE_STEPS, chosen
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.io.files import atomic_write
from tlcm_jax.io.image_size import Resolution

PROMPTS, STEPS = 8, (2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Previews:
    """Draws the previews of a run into its `samples/`, and tells its health (`health.py`).

    Attributes:
      folder: the run's.
      model: the teacher.
      prompts: `PROMPTS` of them are drawn (`results.chosen`).
      seed: of the noise.
      gamma: share of fresh noise between the student's steps.
      timesteps: the student's times by its number of steps.
      resolution: of the images; None is the model's own.
      guidance_scale: of the teacher that the student is held against; None tells no health.
      student_guidance_scale: of the student, 1 for none.
      scorers: of single images, told with the health.
    """

    folder: Path
    model: LatentModel
    prompts: PromptSet
    seed: int
    gamma: float
    timesteps: Mapping[int, Sequence[int]]
    resolution: Resolution
    guidance_scale: float | None
    student_guidance_scale: float = 1.0
    scorers: tuple[Scorer, ...] = ()

    def draw(self, samples: str, adapter: Mapping[str, Any], step: int, stage: str) -> None:
        """Writes a contact sheet at 2 and 4 steps, and a row of health of the latter.

        Args:
          samples: name of the sheets' folder.
          adapter: what is trained, scaled.
          step: over all stages.
          stage: its name.
        """
        prompts = self._few.prompts
        images = {steps: self._student(adapter, steps, self.seed) for steps in STEPS}
        path = self.folder / samples / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [ImageRow(f"{steps} steps", drawn) for steps, drawn in images.items()]
        with atomic_write(path) as part:
            contact_sheet(part, ImageGrid(title=path.stem, prompts=prompts, rows=rows))
        if self.guidance_scale is not None:
            again = self._student(adapter, STEPS[-1], self.seed + 1)
            student = self._values(np.stack([images[STEPS[-1]], again]))
            self._log.write(step, stage, student, self._teacher)

    @functools.cached_property
    def _few(self) -> PromptSet:
        return self.prompts.rows(chosen(self.prompts, PROMPTS))

    @functools.cached_property
    def _log(self) -> health.HealthLog:
        return health.HealthLog(path=self.folder / health.HEALTH_FILE)

    @property
    def _options(self) -> GenerationOptions:
        return GenerationOptions(resolution=self.resolution, batch_size=PROMPTS)

    def _student(
        self, adapter: Mapping[str, Any], steps: int, seed: int
    ) -> UInt8[np.ndarray, "n h w 3"]:
        how = self.gamma, self._options, self.timesteps.get(steps), self.student_guidance_scale
        return generate(self.model, self._few.prompts, steps, seed, adapter, *how)

    @functools.cached_property
    def _teacher(self) -> health.Values:
        """The teacher's values: drawn once a run, read from the log where it goes on."""
        if rows := self._log.rows():
            return rows[-1]["teacher"]
        prompts, scale = self._few.prompts, self.guidance_scale
        assert scale is not None
        draws = [
            generate_teacher(self.model, prompts, REFERENCE_STEPS, scale, seed, self._options)
            for seed in (self.seed, self.seed + 1)
        ]
        return self._values(np.stack(draws))

    def _values(self, images: UInt8[np.ndarray, "2 n h w 3"]) -> health.Values:
        few = self._few
        found = health.health(images)
        return found | health.scored(self.scorers, images, few.prompts, few.annotations)
