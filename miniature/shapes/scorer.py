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

from miniature.shapes.captions import parse_chinese, parse_english
from miniature.shapes.parser import parse, satisfies
from miniature.shapes.scene import RUNGS, SIDE, Rung, Spec
from tlcm_jax.evaluation.scorers.base import Annotations, Measure, Scorer


@dataclasses.dataclass(frozen=True, eq=False)
class ParserScorer(Scorer):
    """Equation (1), and the share of images in which the parser finds none of this world's scenes.

    Attributes:
      rung: how much of the world is in use.
    """

    rung: Rung

    name = "parser"
    differentiable = False
    threshold = None
    params = None
    measures = (
        Measure(key="all_checks", title="all checks", percent=True),
        Measure(key="malformed", title="malformed", percent=True, higher_is_better=False),
    )

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`: every prompt must be a caption of the world."""
        del annotations
        for prompt in prompts:
            spec_of_caption(prompt)

    def values(
        self, images: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """See `Scorer`: truth values `[n]`.

        Raises:
          ValueError: the images are not `[n, 64, 64, 3]`.
        """
        del annotations
        if images.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(
                f"scorer miniature.shapes.scorer: images of {images.shape[1:]}; the parser reads "
                f"those of {(SIDE, SIDE, 3)}"
            )
        found = [parse(image, self.rung) for image in images]
        specs = map(spec_of_caption, prompts)
        right = [satisfies(one, spec) for one, spec in zip(found, specs, strict=True)]
        return {
            "all_checks": np.array(right, np.float32),
            "malformed": np.array([bool(one.malformed) for one in found], np.float32),
        }


@functools.lru_cache(maxsize=4096)
def spec_of_caption(text: str) -> Spec:
    """What a caption, English or Chinese, asks for.

    Raises:
      ValueError: it is none of this world's; what was not understood is named.
    """
    return (parse_english if text.isascii() else parse_chinese)(text)


def load(path: str = "") -> ParserScorer:
    """The parser of a rung: `miniature.shapes.scorer=r2`; without one, of the first.

    Raises:
      ValueError: there is no such rung.
    """
    if (rung := path or "r1") not in RUNGS:
        raise ValueError(f"scorer miniature.shapes.scorer={path}: give one of {', '.join(RUNGS)}")
    return ParserScorer(RUNGS[rung])
