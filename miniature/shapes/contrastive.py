"""The scorer of the world of shapes that preference can follow: `miniature.shapes.contrastive`.

    s(image, text) = 100 cos(u(image), v(text))

A small contrastive network (`miniature/contrastive.py`) that `train_scorer.py` has trained on fresh
renders. It shares no weight, no label and no code of reading with the parser, which stays the one
that a gradient cannot follow. English captions.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from miniature.contrastive import ContrastiveScorer
from miniature.shapes.captions import parse_english
from miniature.shapes.scene import RUNGS
from miniature.shapes.scorer import score_of_reals
from tlcm_jax.evaluation.scorers.base import Annotations, Measure

FOLDER = Path(__file__).with_name("contrastive")


@dataclasses.dataclass(frozen=True, eq=False)
class ShapesContrastive(ContrastiveScorer):
    """A trained scorer; see `ContrastiveScorer`."""

    @property
    def measures(self) -> Sequence[Measure]:
        """See `Scorer`."""
        return (Measure(key=self.name, title="contrastive score"),)

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`: every prompt must be an English caption of the world."""
        del annotations
        for prompt in prompts:
            parse_english(prompt)

    def real_data_score(self, prompt_set: str, count: int) -> dict[str, float]:
        """See `Scorer`: of one fresh render of each caption of the first rung."""
        return score_of_reals(self, RUNGS["r1"], prompt_set, count)


def load(path: str = "") -> ShapesContrastive:
    """The scorer of a folder; without one this world's own."""
    return ShapesContrastive.load(path or FOLDER)
