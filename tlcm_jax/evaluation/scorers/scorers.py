"""What evaluation asks of a scorer, and the table of those there are.

A new scorer is one file beside this one, and one line in `SCORERS`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from miniature.judge import Judge
from tlcm_jax.evaluation.scorers.rewards import Reward, load_reward, mean_score

Annotations = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that a scorer gives to a set of pictures.

    Attributes:
      key: under which it is reported.
      title: for people.
      percent: a share in 0..1 rather than a plain number.
      higher_is_better: False for distances.
    """

    key: str
    title: str
    percent: bool = True
    higher_is_better: bool = True


class Scorer(Protocol):
    """Scores sets of pictures that were drawn from prompts."""

    @property
    def name(self) -> str:
        """As in `SCORERS`."""

    @property
    def measures(self) -> Sequence[Measure]:
        """What `score` returns, in the order in which it is shown."""

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """Raises a ValueError if pictures of these prompts cannot be scored, before any is drawn.

        Args:
          prompts: n texts.
          annotations: lists of n by key, as in `data.prompt_sets.PromptSet`.
        """

    def score(
        self, pictures: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, float]:
        """Scores pictures, uint8 `[n, h, w, 3]`, by `Measure.key`."""

    def ceiling(self, split: str, count: int) -> dict[str, float]:
        """What `count` real pictures of a split of prompts score; empty where that is unknown."""


@dataclasses.dataclass(frozen=True)
class JudgeScorer:
    """The miniature's judge: objects and styles by the prompts' `label` and `style`.

    The Frechet distance is to all real pictures that the teacher was trained on, whatever the
    prompts: the larger sample is the less noisy one.

    Attributes:
      judge: the network with the statistics of real pictures.
    """

    judge: Judge

    name = "judge"
    measures = (
        Measure(key="object_top1", title="object top-1"),
        Measure(key="object_top5", title="object top-5"),
        Measure(key="style_accuracy", title="style"),
        Measure(key="frechet_distance", title="Fréchet", percent=False, higher_is_better=False),
    )

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`."""
        for key, known in (("label", self.judge.labels), ("style", self.judge.styles)):
            if key not in annotations:
                raise ValueError(
                    f"the judge needs each prompt's {key!r}: put a JSON file of the same name "
                    "beside the prompt file, or leave out --scores judge"
                )
            for value in annotations[key]:
                if value not in known:
                    raise ValueError(f"the judge knows no {key} {value!r}: leave that prompt out")
        if len(prompts) < 2:
            raise ValueError("the judge's Frechet distance needs at least 2 prompts")

    def score(
        self, pictures: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, float]:
        """See `Scorer`."""
        report = self.judge.report(
            pictures.astype(np.float32) / 255, annotations["label"], annotations["style"]
        )
        return {
            "object_top1": report["object_top1"],
            "object_top5": report["object_top5"],
            "style_accuracy": report["style"],
            "frechet_distance": report["frechet"],
        }

    def ceiling(self, split: str, count: int) -> dict[str, float]:
        """See `Scorer`; the distance is what as many real pictures have to the others."""
        real = self.judge.real.get(split)
        if real is None:
            return {}
        return {
            "object_top1": real["object_top1"],
            "object_top5": real["object_top5"],
            "style_accuracy": real["style"],
            "frechet_distance": self.judge.floor(count),
        }


@dataclasses.dataclass(frozen=True)
class RewardScorer:
    """A scorer that preference can follow, as one that is told: the mean over the pictures.

    Attributes:
      name: a key of `rewards.REWARDS`, and of the score.
      reward: the scorer.
    """

    name: str
    reward: Reward

    @property
    def measures(self) -> Sequence[Measure]:
        """See `Scorer`."""
        return (Measure(key=self.name, title=f"{self.name} score", percent=False),)

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`; any text will do."""

    def score(
        self, pictures: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, float]:
        """See `Scorer`."""
        return {self.name: mean_score(self.reward, pictures, prompts)}

    def ceiling(self, split: str, count: int) -> dict[str, float]:
        """See `Scorer`; not known."""
        return {}


def _reward(name: str) -> Callable[[str | os.PathLike], Scorer]:
    return lambda folder: RewardScorer(name, load_reward(name, str(folder), followed=False))


# Name -> loader, given the folder that holds the scorer's weights.
SCORERS: Mapping[str, Callable[[str | os.PathLike], Scorer]] = {
    "judge": lambda folder: JudgeScorer(Judge.load(folder)),
    "contrastive": _reward("contrastive"),
}


def check_scorers(names: Sequence[str]) -> None:
    """Raises a ValueError that lists the known names, if one is unknown."""
    for name in names:
        if name not in SCORERS:
            raise ValueError(f"unknown score {name!r}; known: {', '.join(SCORERS)}")


def load_scorers(folders: Mapping[str, str | os.PathLike]) -> tuple[Scorer, ...]:
    """Loads scorers.

    Args:
      folders: the folder of each scorer's weights, by name.

    Raises:
      ValueError: an unknown name; the known ones are listed.
      FileNotFoundError: weights are missing.
    """
    check_scorers(list(folders))
    return tuple(SCORERS[name](folder) for name, folder in folders.items())
