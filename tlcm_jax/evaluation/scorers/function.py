"""A plain Python function of images and their prompts as a scorer: what a plug-in may return.

    def load(path: str):
        return lambda images, prompts: images[..., 0].mean(axis=(1, 2))

It has no gradient: evaluations tell its mean, and the term `reward` can follow it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from tlcm_jax.evaluation.scorers.base import Annotations, Scorer


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionScorer(Scorer):
    """A score of each image by itself; higher is better.

    Attributes:
      name: under which it is reported.
      function: of images, `[n, h, w, 3]` uint8, and n prompts, to n numbers.
    """

    name: str
    function: Callable[[np.ndarray, Sequence[str]], Any]

    differentiable = False
    threshold = None
    params = None

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """See `Scorer`.

        Raises:
          ValueError: the function gives anything but n numbers.
        """
        del annotations
        scores = np.asarray(self.function(images, prompts))
        if scores.shape != (len(images),) or scores.dtype.kind not in "fiub":
            raise ValueError(
                f"scorer {self.name!r} gives {scores.dtype} {scores.shape} for {len(images)} "
                f"images: its function must return {len(images)} numbers"
            )
        return {self.name: scores.astype(np.float32)}


def check_callable(name: str, loaded: Any) -> Callable[..., Any]:
    """What a plug-in's `load` returned, if it can be called.

    Raises:
      ValueError: it cannot.
    """
    if not callable(loaded):
        raise ValueError(
            f"scorer {name!r}: its `load(path)` returns {type(loaded).__name__}: return a Scorer, "
            "or a function of images and prompts"
        )
    return loaded
