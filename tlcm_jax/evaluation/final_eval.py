"""What a run ends with: the student's images and scores beside the teacher's, and the report."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from tlcm_jax.data.prompt_sets import PromptSet, read_prompt_set
from tlcm_jax.evaluation import health
from tlcm_jax.evaluation import report as evaluation_report
from tlcm_jax.evaluation.evaluate import check_prompt_sets, check_steps, evaluate
from tlcm_jax.evaluation.health import HEALTH_FILE, HealthLog
from tlcm_jax.evaluation.reporting.contents import Curve
from tlcm_jax.evaluation.reporting.provenance import provenance
from tlcm_jax.evaluation.results import Evaluation
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorers
from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.image_size import Resolution

IMAGES = "images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalEval:
    """What is generated and scored when a run has ended; loaded before it begins.

    Attributes:
      prompt_sets: the headline's first.
      scorers: of the images.
      steps: the student's step counts.
      guidance_scale: of the teacher.
      gamma: share of fresh noise between the student's steps.
      student_guidance_scales: of the student, 1 for none.
      undistilled: step counts of the teacher by the student's sampler.
      pictures: prompts of each set whose images the report shows.
      name: of the student.
      seed: of the noise.
      resolution: of the images; None is the model's own.
      timesteps: the student's times by its number of steps.
      trained_on: all texts of the training.
    """

    prompt_sets: tuple[PromptSet, ...]
    scorers: tuple[Scorer, ...]
    steps: tuple[int, ...]
    guidance_scale: float
    gamma: float
    student_guidance_scales: tuple[float, ...]
    undistilled: tuple[int, ...]
    pictures: int
    name: str
    seed: int
    resolution: Resolution
    timesteps: Mapping[int, Sequence[int]]
    trained_on: Collection[str]

    @classmethod
    def load(
        cls, *, prompts: Sequence[str], scorers: Sequence[str], steps: Sequence[int], limit: int,
        undistilled: Sequence[int] = (), **rest: Any,
    ) -> "FinalEval":  # fmt: skip
        """Reads and loads what a recipe's `evaluation` names, so that what is missing is found now.

        Args:
          prompts: files of them.
          scorers: each as NAME or NAME=PATH.
          steps: the student's step counts.
          limit: prompts used of each file; 0 takes all.
          undistilled: step counts of the teacher by the student's sampler.
          **rest: the other attributes, as they are.

        Raises:
          FileNotFoundError, ValueError: a prompt file or a scorer that there is not, or prompts
            that a scorer cannot score.
        """
        steps = tuple(check_steps(steps))
        undistilled = tuple(check_steps(undistilled)) if undistilled else ()
        sets = tuple(read_prompt_set(path).first(limit) for path in prompts)
        loaded = load_scorers(scorers)
        check_prompt_sets(sets, loaded)
        return cls(prompt_sets=sets, scorers=loaded, steps=steps, undistilled=undistilled, **rest)


def final_eval(
    wanted: FinalEval,
    model: LatentModel,
    adapter: Mapping[str, Any],
    workdir: Path,
    *,
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    started: float,
    progress: bool = True,
) -> Evaluation:
    """Generates, scores and reports, into a workdir.

    Args:
      wanted: what.
      model: the teacher.
      adapter: what was trained, scaled.
      workdir: the folder of `metrics.json`, `report.html`, `samples/` and `images/`.
      history: the rows of the training's metrics.
      config: the recipe, shown in the report.
      started: `time.monotonic()` when the run began.
      progress: whether to draw progress bars.
    """
    result = evaluate(
        model,
        wanted.prompt_sets,
        lora=adapter,
        teacher=model,
        steps=wanted.steps,
        guidance_scales=(wanted.guidance_scale,),
        gammas=(wanted.gamma,),
        student_guidance_scales=wanted.student_guidance_scales,
        undistilled=wanted.undistilled,
        timesteps=wanted.timesteps,
        seed=wanted.seed,
        resolution=wanted.resolution,
        scorers=wanted.scorers,
        pictures=wanted.pictures,
        store=workdir / IMAGES,
        progress=progress,
    )
    steps = f"{wanted.steps[0]} to {wanted.steps[-1]}" if len(wanted.steps) > 1 else wanted.steps[0]
    report = evaluation_report.build_report(
        result,
        title=f"{wanted.name}: distilled, in {steps} steps",
        summary="The same prompts and noise by the student and by its teacher with guidance "
        f"{wanted.guidance_scale:g}. {overlap_note(wanted.prompt_sets, wanted.trained_on)}",
        pictures=wanted.pictures,
        curves=[*curves(history), *health.curves(HealthLog(path=workdir / HEALTH_FILE).rows())],
        config=config,
        provenance=provenance(time.monotonic() - started),
    )
    evaluation_report.save(workdir, result, report)
    logging.info("report: %s", workdir / "report.html")
    return result


def overlap_note(prompt_sets: Sequence[PromptSet], trained_on: Collection[str]) -> str:
    """How many of the prompts were trained on, by their text; white space and case aside."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    trained, notes = {plain(text) for text in trained_on}, []
    for prompts in prompt_sets:
        shared = sum(plain(prompt) in trained for prompt in prompts.prompts)
        if shared:
            notes.append(f"{shared} of the {len(prompts.prompts)} prompts of {prompts.name}")
    if not notes:
        return "None of the prompts was used in training."
    return f"Used in training, too: {', '.join(notes)}."


def curves(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Loss, gradient norm and throughput of every stage."""
    shown = (
        ("loss", "loss", "", True),
        ("grad_norm", "gradient norm", "", True),
        ("nfe_per_second", "throughput", "NFE/s", False),
    )
    found = []
    for stage in dict.fromkeys(row["stage"] for row in history):
        rows = [row for row in history if row["stage"] == stage]
        for key, title, unit, log in shown:
            # A stage of one row has no curve; a resumed row may lack its throughput.
            points = [(row["stage_step"], row[key]) for row in rows if row.get(key) is not None]
            if len(points) > 1:
                steps, values = zip(*points, strict=True)
                found.append(Curve(stage, title, steps, values, unit, log))
    return found
