"""What an evaluation comes to: the images that are shown, and everybody's scores."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.evaluation.contestants import Contestant
from tlcm_jax.evaluation.reporting.contents import Kind
from tlcm_jax.evaluation.scorers.base import Measure

# Of the teacher as it is used, which the student is held against.
REFERENCE_STEPS = 25
# What a prompt set may say of its prompts, by which those that are shown are chosen.
# What tells prompts apart, where it is known of them.
KINDS = ("style", "task")


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """The images of one prompt set by one contestant.

    Attributes:
      by: whose they are.
      images: those that are kept, one for each of `SetResult.shown`.
      scores: by `Measure.key`, of all images; empty without scorers.
      intervals: of the scores that are means over images, 95 % by resampling them.
    """

    by: Contestant
    images: UInt8[np.ndarray, "n h w 3"]
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """Whose."""
        return self.by.kind

    @property
    def steps(self) -> int:
        """In how many."""
        return self.by.steps


@dataclasses.dataclass(frozen=True, eq=False)
class SetResult:
    """All that was generated from one prompt set.

    Attributes:
      prompts: the set.
      shown: rows of the prompts whose images are kept, rising.
      generated: the student's by steps, the teacher's, the baselines'.
      real: scores of as many real images; empty where they are not known.
    """

    prompts: PromptSet
    shown: Int[np.ndarray, " n"]
    generated: tuple[Generated, ...]
    real: Mapping[str, float]

    def find(self, kind: Kind, steps: int) -> Generated | None:
        """What this contestant generated, if it did; of several variants the first."""
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
          `prompts` (how many), `real`, and `student`, `teacher` and each baseline: by steps (and
          variant, where there are several), the scores and, beside those of the 25-step teacher,
          `relative` to them; and their 95 % `intervals` where they are means over images.
        """
        sets = {}
        for result in self.sets:
            entries: dict[str, dict] = {"student": {}, "teacher": {}}
            for one in result.generated:
                by = one.by
                of_name = entries.setdefault(by.name or by.kind, {})
                relative = result.relative(one)
                intervals = {key: list(ends) for key, ends in one.intervals.items()}
                of_name[", ".join(filter(None, (str(by.steps), by.variant)))] = {
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


def chosen(prompts: PromptSet, count: int) -> Int[np.ndarray, " n"]:
    """Which prompts are shown: the first ones, of each of their kind in turn where it is known."""
    known = kind_of(prompts)
    kinds = prompts.annotations[known] if known else [""] * len(prompts.prompts)
    turn: dict[Any, int] = {}
    order = []
    for index, kind in enumerate(kinds):
        turn[kind] = turn.get(kind, -1) + 1
        order.append((turn[kind], index))
    return np.array([index for _, index in sorted(order)[:count]])


def kind_of(prompts: PromptSet) -> str:
    """The first of `KINDS` that is known of prompts; "" if none is."""
    return next((kind for kind in KINDS if kind in prompts.annotations), "")
