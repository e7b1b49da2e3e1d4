"""Which size of images a refill is of: buckets of sizes with weights.

SDXL was trained on images of many aspect ratios in batches of one size each, and is told the size
(Podell et al. 2023, arXiv 2307.01952, section 2.3). Distillation makes its own data, so the mix is
free. Refill r of a stage takes the bucket in whose share of 0 .. 1 falls

    u_r = (u_0 + r g) mod 1,   g = (sqrt(5) - 1) / 2,                            (1)

with u_0 of the stage's seed: a function of r alone, so that a resumed run draws the same buckets,
and evenly spread, so that shares are the weights within a refill or two even in a short run.
"""

import dataclasses
import hashlib
import itertools

from tlcm_jax.io.image_size import ImageSize

# g of (1) and its range, in whole numbers, which do not lose digits as r grows.
_STEP, _RANGE = 0x9E3779B97F4A7C15, 2**64


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes of a stage's refills.

    Attributes:
      shares: sizes and their weights, above 0.
      seed: of the stage.
    """

    shares: tuple[tuple[ImageSize, float], ...]
    seed: int

    def at(self, refill: int) -> ImageSize:
        """Equation (1): the size of refill number `refill`."""
        start = int.from_bytes(hashlib.sha256(f"buckets {self.seed}".encode()).digest()[:8])
        place = (start + refill * _STEP) % _RANGE / _RANGE
        sizes, weights = zip(*self.shares, strict=True)
        ends = list(itertools.accumulate(weights))
        # The last one's end is 1, whatever rounding makes of it.
        return next(
            (s for s, end in zip(sizes, ends, strict=True) if place * ends[-1] < end), sizes[-1]
        )
