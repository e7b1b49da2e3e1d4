"""Draws and scores a student at several step counts, beside its teacher.

Student and teacher draw the same prompts from the same noise. Every score is meant to be read
beside two others: the teacher's at 25 steps, which the student imitates, and that of real
pictures, where the scorer knows it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.evaluation.reporting.contents import Kind
from tlcm_jax.evaluation.scorers.base import Measure, Scorer
from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher, merged
from tlcm_jax.generation.image_cache import cached, weights_hash

# The teacher as it is used, which is what the student is held against; and with as few steps as
# the student, which is what distillation is for.
REFERENCE_STEPS = 25
TEACHER_STEPS = (REFERENCE_STEPS, 4)

# Pictures of prompts in a number of steps.
_Draw = Callable[[Sequence[str], int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """The pictures of one prompt set by one sampler.

    Attributes:
      kind: whose they are.
      steps: in how many steps.
      pictures: uint8 `[n, h, w, 3]`.
      scores: by `Measure.key`; empty without scorers.
    """

    kind: Kind
    steps: int
    pictures: np.ndarray
    scores: Mapping[str, float]

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.kind}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclasses.dataclass(frozen=True, eq=False)
class SetResult:
    """All that was drawn from one prompt set.

    Attributes:
      prompts: the set.
      drawn: the student's by steps, then the teacher's.
      real: scores of as many real pictures; empty where they are not known.
    """

    prompts: PromptSet
    drawn: tuple[Drawn, ...]
    real: Mapping[str, float]

    def find(self, kind: Kind, steps: int) -> Drawn | None:
        """What was drawn by this sampler, if it was."""
        return next((d for d in self.drawn if (d.kind, d.steps) == (kind, steps)), None)

    def relative(self, drawn: Drawn) -> dict[str, float]:
        """Scores as multiples of the 25-step teacher's; empty without one."""
        teacher = self.find("teacher", REFERENCE_STEPS)
        if teacher is None:
            return {}
        return {
            key: value / teacher.scores[key]
            for key, value in drawn.scores.items()
            if teacher.scores[key]
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Pictures and scores of a student and its teacher.

    Attributes:
      model: where the weights came from.
      seed: of the noise.
      guidance_scale: of the teacher; None where no teacher was drawn.
      gamma: share of fresh noise between the student's steps.
      measures: what was scored, in the order in which it is shown.
      sets: one result a prompt set.
      seconds: what `drawing` and `scoring` took.
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
          beside those of the 25-step teacher, `relative` to them.
        """
        return {
            "model": self.model,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "gamma": self.gamma,
            "seconds": {key: round(value, 1) for key, value in self.seconds.items()},
            "sets": {result.prompts.name: _set_metrics(result) for result in self.sets},
        }


def _set_metrics(result: SetResult) -> dict[str, Any]:
    """One prompt set of `Evaluation.metrics`."""
    entries: dict[str, dict] = {"student": {}, "teacher": {}}
    for drawn in result.drawn:
        entry: dict[str, Any] = dict(drawn.scores)
        relative = result.relative(drawn)
        if relative and (drawn.kind, drawn.steps) != ("teacher", REFERENCE_STEPS):
            entry["relative"] = relative
        entries[drawn.kind][str(drawn.steps)] = entry
    return {"prompts": len(result.prompts.prompts), "real": dict(result.real), **entries}


def evaluate(
    pipeline: StableDiffusion,
    prompt_sets: Sequence[PromptSet],
    *,
    lora: Mapping[str, Any] | None = None,
    teacher: StableDiffusion | None = None,
    steps: Sequence[int] = (1, 2, 3, 4, 8),
    further_steps: Sequence[int] | None = None,
    guidance_scale: float = 8.0,
    gamma: float = 1.0,
    seed: int = 0,
    resolution: int | None = None,
    scorers: Sequence[Scorer] = (),
    cache: Path | None = None,
    # Divides the miniature's 400 and 300 prompts; on a CPU larger ones cost more a picture.
    batch_size: int = 25,
    progress: bool = False,
) -> Evaluation:
    """Draws prompt sets with a student and its teacher, and scores the pictures.

    Args:
      pipeline: the student, or what its adapter belongs to.
      prompt_sets: of different names, at least one.
      lora: the student's adapter, already scaled.
      teacher: the undistilled model; None draws no teacher. `pipeline` itself if that, without
        the adapter, is the teacher.
      steps: the student's step counts, each 1 to 8.
      further_steps: those on the sets after the first, where the teacher is then drawn at 25
        steps only: a shorter evaluation. As on the first by default.
      guidance_scale: the teacher's.
      gamma: share of fresh noise between the student's steps, 0 to 1.
      seed: of the noise.
      resolution: side of the pictures in pixels; the model's own by default.
      scorers: none draws pictures only.
      cache: folder where the teacher's pictures are kept, so that they are drawn once for a
        model, prompts, scale and seed; None keeps none.
      batch_size: pictures at a time.
      progress: draw progress bars.

    Raises:
      ValueError: steps out of range, no prompts, two sets of one name, or prompts that a scorer
        cannot score; before anything is drawn.
    """
    plan = _plan(steps, TEACHER_STEPS if teacher else ())
    further = plan
    if further_steps is not None:
        further = _plan(further_steps, TEACHER_STEPS[:1] if teacher else ())
    check_names(prompt_sets)
    for prompts in prompt_sets:
        for scorer in scorers:
            scorer.check(prompts.prompts, prompts.annotations)
    options = GenerationOptions(resolution=resolution, batch_size=batch_size, progress=progress)
    samplers: dict[Kind, _Draw] = {"student": _student(pipeline, lora, seed, gamma, options)}
    if teacher is not None:
        samplers["teacher"] = _teacher(teacher, guidance_scale, cache, seed, options)
    stopwatch = _Stopwatch()
    results = []
    for prompts in prompt_sets:
        drawn = []
        for kind, count in plan if prompts is prompt_sets[0] else further:
            with stopwatch("drawing"):
                pictures = samplers[kind](prompts.prompts, count)
            with stopwatch("scoring"):
                scores = _score(scorers, pictures, prompts)
            drawn.append(Drawn(kind, count, pictures, scores))
            shown = ", ".join(f"{key} {value:.3f}" for key, value in scores.items())
            logging.info("%s, %s: %s", prompts.name, drawn[-1].label, shown or "drawn")
        real = {
            key: value
            for scorer in scorers
            for key, value in scorer.real_data_score(prompts.name, len(prompts.prompts)).items()
        }
        results.append(SetResult(prompts, tuple(drawn), real))
    return Evaluation(
        model=pipeline.source,
        seed=seed,
        guidance_scale=None if teacher is None else float(guidance_scale),
        gamma=float(gamma),
        measures=tuple(measure for scorer in scorers for measure in scorer.measures),
        sets=tuple(results),
        seconds=stopwatch.seconds,
    )


def _plan(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[Kind, int]]:
    """Who draws, in how many steps."""
    own: list[tuple[Kind, int]] = [("student", count) for count in check_steps(student)]
    return own + [("teacher", count) for count in teacher]


def _student(
    pipeline: StableDiffusion, lora: Any, seed: int, gamma: float, options: GenerationOptions
) -> _Draw:
    student = pipeline
    if lora is not None:  # once for all step counts
        unet = merged(pipeline.params["unet"], lora)
        student = dataclasses.replace(pipeline, params={**pipeline.params, "unet": unet})
    return lambda prompts, steps: generate(
        student, prompts, steps, seed, gamma=gamma, options=options
    )


def _teacher(
    teacher: StableDiffusion,
    scale: float,
    cache: Path | None,
    seed: int,
    options: GenerationOptions,
) -> _Draw:
    fingerprint = weights_hash(teacher) if cache is not None else ""

    def draw(prompts: Sequence[str], steps: int) -> np.ndarray:
        description = [fingerprint, list(prompts), steps, float(scale), seed]
        if options.resolution is not None:
            description.append(options.resolution)
        return cached(
            cache,
            description,
            lambda: generate_teacher(teacher, prompts, steps, scale, seed, options),
        )

    return draw


def check_names(prompt_sets: Sequence[PromptSet]) -> None:
    """Raises a ValueError unless there are prompt sets, each of its own name."""
    names = [prompts.name for prompts in prompt_sets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompt sets {names}: give at least one, each with its own name")


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


def _score(scorers: Sequence[Scorer], pictures: np.ndarray, prompts: PromptSet) -> dict:
    scores: dict[str, float] = {}
    for scorer in scorers:
        values = scorer.values(pictures, prompts.prompts, prompts.annotations)
        scores |= scorer.summarise(values)
    return scores


class _Stopwatch:
    """Adds up what parts of the work take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str):
        start = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - start
