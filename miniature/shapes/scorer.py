"""What the parser reads in images, as a scorer: `scorers=("miniature.shapes.scorer",)`.

    all checks = mean over images of [well formed, and all that the caption names holds]      (1)

The captions are the world's own, English or Chinese, and are read back into what they ask for. The
parser has no gradient: of the terms `reward` alone can follow it, and what has followed it is no
longer judged by it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from miniature.shapes.captions import parse_chinese, parse_english
from miniature.shapes.parser import Parse, parse, satisfies
from miniature.shapes.prompts import prompt_sets, spec_of
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, SIDE, TEST_START, Rung, Spec, draw_scene
from tlcm_jax.evaluation.scorers.base import Annotations, Measure, Scorer


@dataclasses.dataclass(frozen=True, eq=False)
class ShapesScorer(Scorer):
    """What the scorers of this world share: the parser has read the images.

    Attributes:
      rung: how much of the world is in use.
    """

    rung: Rung

    differentiable = False
    threshold = None
    params = None

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`: every prompt must be a caption of the world."""
        del annotations
        for prompt in prompts:
            spec_of_caption(prompt)

    def real_data_score(self, prompt_set: str, count: int) -> dict[str, float]:
        """See `Scorer`: of one fresh render of each caption."""
        return score_of_reals(self, self.rung, prompt_set, count)


class ParserScorer(ShapesScorer):
    """Equation (1), and the share of images that are none of this world's scenes."""

    name = "parser"
    measures = (
        Measure(key="all_checks", title="all checks", percent=True),
        Measure(key="malformed", title="malformed", percent=True, higher_is_better=False),
    )

    def values(
        self, images: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """See `Scorer`: truth values `[n]`.

        Raises:
          ValueError: the images are not `[n, 64, 64, 3]`.
        """
        del annotations
        found = [parsed(image, self.rung) for image in images]
        specs = map(spec_of_caption, prompts)
        right = [satisfies(one, spec) for one, spec in zip(found, specs, strict=True)]
        return {
            "all_checks": np.array(right, np.float32),
            "malformed": np.array([bool(one.malformed) for one in found], np.float32),
        }


def score_of_reals(scorer: Scorer, rung: Rung, prompt_set: str, count: int) -> dict[str, float]:
    """What a scorer says of one fresh render of each caption of a set; empty for other sets."""
    entries = prompt_sets(rung).get(prompt_set, [])[:count]
    if not entries:
        return {}
    images = reals([spec_of(entry) for entry in entries], rung)
    return scorer.summarise(scorer.values(images, [entry["prompt"] for entry in entries], {}))


def reals(specs: Sequence[Spec], rung: Rung) -> UInt8[np.ndarray, "n 64 64 3"]:
    """One render of each spec, of integers that no training has."""
    scenes = (draw_scene(spec, TEST_START + i, rung) for i, spec in enumerate(specs))
    return np.stack([render(scene) for scene in scenes])


def parsed(image: UInt8[np.ndarray, "64 64 3"], rung: Rung) -> Parse:
    """What the parser finds in an image; once, for all scorers that ask.

    Raises:
      ValueError: the image is not `[64, 64, 3]`.
    """
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(
            f"miniature.shapes: an image of {image.shape}; the parser reads those of "
            f"{(SIDE, SIDE, 3)}"
        )
    return _parsed(image.tobytes(), rung.name)


@functools.lru_cache(maxsize=1024)
def _parsed(pixels: bytes, rung: str) -> Parse:
    return parse(np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE, 3), RUNGS[rung])


@functools.lru_cache(maxsize=4096)
def spec_of_caption(text: str) -> Spec:
    """What a caption, English or Chinese, asks for.

    Raises:
      ValueError: it is none of this world's; what was not understood is named.
    """
    return (parse_english if text.isascii() else parse_chinese)(text)


def rung_named(name: str, scorer: str) -> Rung:
    """The rung that a scorer's path names; the first without one.

    Raises:
      ValueError: there is no such rung.
    """
    if (rung := name or "r1") not in RUNGS:
        raise ValueError(f"scorer {scorer}={name}: give one of {', '.join(RUNGS)}")
    return RUNGS[rung]


def load(path: str = "") -> ParserScorer:
    """The parser of a rung: `miniature.shapes.scorer=r2`; without one, of the first.

    Raises:
      ValueError: there is no such rung.
    """
    return ParserScorer(rung_named(path, "miniature.shapes.scorer"))
