"""Draws and scores a student, or the teacher, as `runs.Asked` has it.

What the scorers tell of all prompts is kept by their own keys. Beside it stand, of the first
measure of the first scorer (the parser's all checks),

    TASK      its mean over the prompts of a task, spaces as underscores
    unseen    its mean over the prompts of what the teacher never saw
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.results.runs import Asked
from tlcm_jax.data.prompt_sets import PromptSet, read_prompt_set
from tlcm_jax.evaluation.evaluate import evaluate
from tlcm_jax.evaluation.results import chosen
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorers
from tlcm_jax.families.base import LatentModel

UNSEEN = "unseen"
# Of the unseen prompts, where they are asked for.
UNSEEN_STEPS = (4,)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What was drawn and scored.

    Attributes:
      scores: by kind of sampler, by steps, by key.
      real: scores of real pictures, by key.
      prompts: how many were scored, the unseen ones not among them.
      unseen: how many of those.
      shown: the prompts whose pictures are kept.
      pictures: of these, uint8 `[shown, h, w, 3]`, by `KIND-STEPS`.
      seconds: what drawing and scoring took.
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    real: Mapping[str, float]
    prompts: int
    unseen: int
    shown: tuple[str, ...]
    pictures: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]


def measure(
    model: LatentModel,
    asked: Asked,
    *,
    lora: Mapping[str, Any] | None = None,
    teacher: bool = False,
) -> Measured:
    """Draws and scores.

    Args:
      model: the teacher.
      asked: what is drawn and scored.
      lora: the student's adapter, scaled.
      teacher: draw the teacher too, in 25 steps and in 4; the student is then the same network
        without its adapter in the student's sampler.
    """
    sets = [_some(read_prompt_set(asked.prompts), asked.limit)]
    if asked.unseen:
        sets.append(_some(read_prompt_set(asked.unseen, UNSEEN), asked.limit))
    scorers = load_scorers(asked.scorers)
    unseen_steps = [count for count in UNSEEN_STEPS if count in asked.steps]
    result = evaluate(
        model,
        sets if unseen_steps else sets[:1],
        lora=lora,
        teacher=model if teacher else None,
        steps=asked.steps,
        further_steps=unseen_steps or None,
        guidance_scales=(asked.guidance_scale,),
        gammas=(asked.gamma,),
        seed=asked.noise,
    )
    first, *further = result.sets
    rows = chosen(first.prompts, asked.shown)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    start = time.monotonic()
    for one in first.generated:
        own = scored(one.images, first.prompts, scorers)
        scores.setdefault(one.kind, {})[str(one.steps)] = own
    for each in further:
        for one in each.generated:
            values = headline(one.images, each.prompts, scorers)
            if values is not None:
                scores[one.kind].setdefault(str(one.steps), {})[UNSEEN] = float(values.mean())
    real: dict[str, float] = {}
    for scorer in scorers:
        real |= scorer.real_data_score(first.prompts.name, len(first.prompts.prompts))
    return Measured(
        scores=scores,
        real=real,
        prompts=len(first.prompts.prompts),
        unseen=sum(len(each.prompts.prompts) for each in further),
        shown=tuple(first.prompts.prompts[i] for i in rows),
        pictures={f"{one.kind}-{one.steps}": one.images[rows] for one in first.generated},
        seconds={"generation": result.seconds["generation"], "scoring": time.monotonic() - start},
    )


def _some(prompts: PromptSet, limit: int) -> PromptSet:
    """So many prompts, of each task in turn; all where limit is 0."""
    return prompts.rows(sorted(chosen(prompts, limit))) if limit else prompts


def scored(images: np.ndarray, prompts: PromptSet, scorers: Sequence[Scorer]) -> dict[str, float]:
    """All scores of the images of some prompts, and the first one by task."""
    found: dict[str, float] = {}
    for scorer in scorers:
        found |= scorer.summarise(scorer.values(images, prompts.prompts, prompts.annotations))
    values = headline(images, prompts, scorers)
    tasks = np.array(prompts.annotations.get("task", []))
    if values is not None:
        for task in dict.fromkeys(tasks):
            found[task.replace(" ", "_")] = float(values[tasks == task].mean())
    return found


def headline(
    images: np.ndarray, prompts: PromptSet, scorers: Sequence[Scorer]
) -> np.ndarray | None:
    """The first measure of the first scorer, of each image; None without scorers."""
    if not scorers:
        return None
    values = scorers[0].values(images, prompts.prompts, prompts.annotations)
    return values[scorers[0].measures[0].key]
