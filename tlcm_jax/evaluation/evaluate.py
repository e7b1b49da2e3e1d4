"""Generates with a student at several step counts, beside its teacher, and scores the images.

Student and teacher see the same prompts and noise. Every score is meant to be read beside two
others: the teacher's at 25 steps, which the student imitates, and that of real images, where the
scorer knows it.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.evaluation.intervals import bootstrap_intervals
from tlcm_jax.evaluation.reporting.contents import Kind
from tlcm_jax.evaluation.scorers.base import Measure, Scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher, merged
from tlcm_jax.generation.image_cache import cached, weights_hash

# The teacher as it is used, which is what the student is held against; and with as few steps as
# the student, which is what distillation is for.
REFERENCE_STEPS = 25
TEACHER_STEPS = (REFERENCE_STEPS, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """The images of one prompt set by one sampler.

    Attributes:
      kind: whose they are.
      steps: in how many steps.
      images: one a prompt.
      scores: by `Measure.key`; empty without scorers.
      intervals: of the scores that are means over images, 95 % by resampling them.
    """

    kind: Kind
    steps: int
    images: UInt8[np.ndarray, "n h w 3"]
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.kind}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclasses.dataclass(frozen=True, eq=False)
class SetResult:
    """All that was generated from one prompt set.

    Attributes:
      prompts: the set.
      generated: the student's by steps, then the teacher's.
      real: scores of as many real images; empty where they are not known.
    """

    prompts: PromptSet
    generated: tuple[Generated, ...]
    real: Mapping[str, float]

    def find(self, kind: Kind, steps: int) -> Generated | None:
        """What this sampler generated, if it did."""
        found = (one for one in self.generated if (one.kind, one.steps) == (kind, steps))
        return next(found, None)

    def relative(self, one: Generated) -> dict[str, float]:
        """Scores as multiples of the 25-step teacher's; empty without one, and for itself."""
        teacher = self.find("teacher", REFERENCE_STEPS)
        if teacher is None or one is teacher:
            return {}
        return {
            key: value / teacher.scores[key]
            for key, value in one.scores.items()
            if teacher.scores[key]
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Images and scores of a student and its teacher.

    Attributes:
      model: where the weights came from.
      seed: of the noise.
      guidance_scale: of the teacher; None where there was none.
      gamma: share of fresh noise between the student's steps.
      measures: what was scored, in the order in which it is shown.
      sets: one result a prompt set.
      seconds: what `generation` and `scoring` took.
    """

    model: str
    seed: int
    guidance_scale: float | None
    gamma: float
    measures: tuple[Measure, ...]
    sets: tuple[SetResult, ...]
    seconds: Mapping[str, float]

    def metrics(self) -> dict[str, Any]:
        """The scores as plain values, as `metrics.json` holds them.

        Returns:
          `model`, `seed`, `guidance_scale`, `gamma`, `seconds`, and under `sets`, by name:
          `prompts` (how many), `real`, and `student` and `teacher`: by steps, the scores and,
          beside those of the 25-step teacher, `relative` to them; and their 95 % `intervals` where
          they are means over images.
        """
        sets = {}
        for result in self.sets:
            entries: dict[str, dict] = {"student": {}, "teacher": {}}
            for one in result.generated:
                relative = result.relative(one)
                intervals = {key: list(ends) for key, ends in one.intervals.items()}
                entries[one.kind][str(one.steps)] = {
                    **one.scores,
                    **({"relative": relative} if relative else {}),
                    **({"intervals": intervals} if intervals else {}),
                }
            count = len(result.prompts.prompts)
            sets[result.prompts.name] = {"prompts": count, "real": dict(result.real), **entries}
        return {
            "model": self.model,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "gamma": self.gamma,
            "seconds": {key: round(value, 1) for key, value in self.seconds.items()},
            "sets": sets,
        }


def evaluate(
    model: LatentModel,
    prompt_sets: Sequence[PromptSet],
    *,
    lora: Mapping[str, Any] | None = None,
    teacher: LatentModel | None = None,
    steps: Sequence[int] = (1, 2, 3, 4, 8),
    further_steps: Sequence[int] | None = None,
    guidance_scale: float = 8.0,
    gamma: float = 1.0,
    timesteps: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
    resolution: int | None = None,
    scorers: Sequence[Scorer] = (),
    cache: Path | None = None,
    # Divides the miniature's 400 and 300 prompts; on a CPU larger ones cost more an image.
    batch_size: int = 25,
    progress: bool = False,
) -> Evaluation:
    """Generates from prompt sets with a student and its teacher, and scores the images.

    Args:
      model: the student, or what its adapter belongs to.
      prompt_sets: of different names, at least one.
      lora: the student's adapter, already scaled.
      teacher: the undistilled model; None leaves it out. `model` itself if that, without
        the adapter, is the teacher.
      steps: the student's step counts, each 1 to 8.
      further_steps: those on the sets after the first, where the teacher then has 25 steps only:
        a shorter evaluation. As on the first by default.
      guidance_scale: the teacher's.
      gamma: share of fresh noise between the student's steps, 0 to 1.
      timesteps: the student's times by its number of steps, where they are not those of the
        authors' release.
      seed: of the noise.
      resolution: side of the images in pixels; the model's own by default.
      scorers: none generates only.
      cache: folder where the teacher's images are kept, so that they are made once for a model,
        prompts, scale and seed; None keeps none.
      batch_size: images at a time.
      progress: draw progress bars.

    Raises:
      ValueError: steps out of range, no prompts, two sets of one name, or prompts that a scorer
        cannot score; before anything is generated.
    """

    def samplers(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[Kind, int]]:
        own: list[tuple[Kind, int]] = [("student", count) for count in check_steps(student)]
        return own + [("teacher", count) for count in teacher]

    first = further = samplers(steps, TEACHER_STEPS if teacher else ())
    if further_steps is not None:
        further = samplers(further_steps, TEACHER_STEPS[:1] if teacher else ())
    check_prompt_sets(prompt_sets, scorers)
    options = GenerationOptions(resolution=resolution, batch_size=batch_size, progress=progress)
    student = model
    if lora is not None:  # once for all step counts
        adapted = merged(model.params[model.backbone], lora)
        student = model.with_params(**{model.backbone: adapted})
    fingerprint = weights_hash(teacher) if teacher is not None and cache is not None else ""

    def images_of(kind: Kind, prompts: Sequence[str], count: int) -> UInt8[np.ndarray, "n h w 3"]:
        if kind == "student":
            return generate(
                student,
                prompts,
                count,
                seed,
                gamma=gamma,
                options=options,
                timesteps=(timesteps or {}).get(count),
            )
        assert teacher is not None
        depends_on = [fingerprint, list(prompts), count, float(guidance_scale), seed]
        if resolution is not None:
            depends_on.append(resolution)
        return cached(
            cache,
            depends_on,
            lambda: generate_teacher(teacher, prompts, count, guidance_scale, seed, options),
        )

    seconds: dict[str, float] = defaultdict(float)
    results = []
    for prompts in prompt_sets:
        generated: list[Generated] = []
        real: dict[str, float] = {}
        for kind, count in first if prompts is prompt_sets[0] else further:
            start = time.monotonic()
            images = images_of(kind, prompts.prompts, count)
            seconds["generation"] += time.monotonic() - start
            start = time.monotonic()
            scores: dict[str, float] = {}
            intervals: dict[str, tuple[float, float]] = {}
            for scorer in scorers:
                values = scorer.values(images, prompts.prompts, prompts.annotations)
                scores |= scorer.summarise(values)
                intervals |= bootstrap_intervals(scorer, values)
            seconds["scoring"] += time.monotonic() - start
            generated.append(Generated(kind, count, images, scores, intervals))
            shown = ", ".join(f"{key} {value:.3f}" for key, value in scores.items())
            logging.info("%s, %s: %s", prompts.name, generated[-1].label, shown or "generated")
        for scorer in scorers:
            real |= scorer.real_data_score(prompts.name, len(prompts.prompts))
        results.append(SetResult(prompts, tuple(generated), real))
    return Evaluation(
        model=model.source,
        seed=seed,
        guidance_scale=None if teacher is None else float(guidance_scale),
        gamma=float(gamma),
        measures=tuple(measure for scorer in scorers for measure in scorer.measures),
        sets=tuple(results),
        seconds=dict(seconds),
    )


def check_prompt_sets(prompt_sets: Sequence[PromptSet], scorers: Sequence[Scorer]) -> None:
    """Raises a ValueError unless there are prompt sets, each named once, that can be scored."""
    names = [prompts.name for prompts in prompt_sets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompt sets {names}: give at least one, each with its own name")
    for prompts in prompt_sets:
        for scorer in scorers:
            scorer.check(prompts.prompts, prompts.annotations)


def check_steps(steps: Sequence[int | str]) -> list[int]:
    """Step counts as numbers, each once, in order.

    Raises:
      ValueError: none, or one that is no whole number in 1 to 8.
    """
    counts = set()
    for step in steps:
        try:
            counts.add(int(step))
        except ValueError:
            raise ValueError(f"steps: {step!r} is not a number; give 1 to 8") from None
    if not counts:
        raise ValueError("steps is empty: give at least one step count in 1 to 8")
    for count in counts:
        student_timesteps(count)
    return sorted(counts)
