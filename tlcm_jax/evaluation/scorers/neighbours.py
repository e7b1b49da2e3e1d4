"""Precision and recall of samples, by nearest neighbours in a space of features.

With r_k(y) the distance of y to its k-th nearest other point of its own set, the ball of that
radius around each point covers about what the set covers (Kynkaanniemi et al., arXiv 1904.06991,
equations 1 and 2), and

    precision = share of samples that lie in the ball of some real image,                   (1)
    recall    = share of real images that lie in the ball of some sample.                   (2)

Precision falls where samples are like no real image, recall where real images are like no sample.
Both depend on how many there are: compare at equal numbers, beside the row of real images.
"""

import numpy as np
from jaxtyping import Float

# Rows of a table of distances at a time.
_ROWS = 1024


def precision_recall(
    real: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], k: int = 3
) -> tuple[float, float]:
    """Equations (1) and (2).

    Args:
      real: features of real images.
      samples: features of what is judged.
      k: which neighbour's distance is the radius.

    Raises:
      ValueError: a set has no k-th neighbour, or its features are not all finite.
    """
    real, samples = np.asarray(real, np.float64), np.asarray(samples, np.float64)
    for each in (real, samples):
        if len(each) <= k:
            raise ValueError(f"{len(each)} images have no {k} neighbours: give at least {k + 1}")
        if not np.isfinite(each).all():
            raise ValueError("features hold NaN or infinity: the images they come from do as well")
    return _covered(real, samples, k), _covered(samples, real, k)


def _covered(by: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of points that lie in the ball of some point of `by`."""
    # A point's nearest is itself, at 0.
    radii = np.concatenate(
        [np.partition(_squared(part, by), k, axis=1)[:, k] for part in _parts(by)]
    )
    inside = [(_squared(part, by) <= radii).any(axis=1) for part in _parts(points)]
    return float(np.mean(np.concatenate(inside)))


def _parts(points: np.ndarray) -> list[np.ndarray]:
    return [points[i : i + _ROWS] for i in range(0, len(points), _ROWS)]


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances `[n, m]`."""
    found = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.maximum(found, 0)
