"""How sure a score is: intervals by resampling the images (the bootstrap, Efron 1979).

Images of a set are drawn again with replacement, as many as there are, and summarised again; the
interval is from the 2.5th to the 97.5th percentile of what these come to. It says how much a score
would move with other prompts like these, and not with another training.
"""

from collections.abc import Mapping

import numpy as np

from tlcm_jax.evaluation.scorers.base import Scorer

_DRAWS, _TAILS = 1000, (2.5, 97.5)


def bootstrap_intervals(
    scorer: Scorer, values: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of what a scorer makes of a set, by `Measure.key`.

    Args:
      scorer: whose values they are.
      values: as `Scorer.values` gives them, `[n, ...]` each.
      seed: of the draws, which are the same for every set of n images, so that two sets' intervals
        are of the same prompts.

    Returns:
      Low and high; empty for scorers of whole sets, whose values are features: a Frechet distance
      of resampled images is biased, for some come twice.
    """
    if any(each.ndim > 1 for each in values.values()):
        return {}
    count = len(next(iter(values.values())))
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(_DRAWS):
        rows = random.integers(count, size=count)
        for key, value in scorer.summarise({k: v[rows] for k, v in values.items()}).items():
            drawn.setdefault(key, []).append(value)
    return {
        key: (float(low), float(high))
        for key, found in drawn.items()
        for low, high in [np.percentile(found, _TAILS)]
    }
