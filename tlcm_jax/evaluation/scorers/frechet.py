"""Frechet distance between two sets of features, each taken as a Gaussian.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))                                     (1)

(Dowson & Landau 1982; Heusel et al., arXiv 1706.08500, use it on Inception features as the FID.)
Following the FID's habit, the value reported is d^2. With S = C1^(1/2), the eigenvalues of
S C2 S are those of C1 C2, and symmetric, so the trace of the root needs two symmetric
eigendecompositions and no iteration, and rank-deficient covariances are no special case:

    tr (C1 C2)^(1/2) = sum_i sqrt(lambda_i(S C2 S))                                       (2)

**Bias.** The value of finite samples is too large, by about K/n for n samples: two sets drawn from
one distribution are not at 0. Compare values only at equal n, and beside `floor`, what real
samples of that n score against other real ones.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and scatter of a set of features, in float64, that grow batch by batch.

    Attributes:
      count: how many samples.
      mean: `[d]`.
      scatter: `[d, d]`, the sum over samples of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dimensions: int) -> "Moments":
        """Moments of no samples, to `update`."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Moments of `[n, d]` features.

        Raises:
          ValueError: not two-dimensional, or not all finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2:
            raise ValueError(f"features must be [samples, dimensions], not {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinity: the images they come from do as well")
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together (Chan et al. 1979; exact up to rounding)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge features of {len(self.mean)} and {len(other.mean)} dimensions"
            )
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * (other.count / count),
            self.scatter + other.scatter + np.outer(gap, gap) * (self.count * other.count / count),
        )

    def update(self, features: np.ndarray) -> "Moments":
        """Moments with another batch `[n, d]` added."""
        return self.merge(Moments.of(features))

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance `[d, d]`.

        Raises:
          ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of two sets, equation (1); symmetric, at least 0.

    Raises:
      ValueError: fewer than two samples in a set, or different dimensions.
    """
    return gaussian_distance(first.mean, first.covariance, second.mean, second.covariance)


def gaussian_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians, equation (1), from means and covariances."""
    if mean1.shape != mean2.shape:
        raise ValueError(f"cannot compare features of {len(mean1)} and {len(mean2)} dimensions")
    values, vectors = np.linalg.eigh(covariance1)
    # Rounding leaves eigenvalues of a singular covariance slightly below 0.
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ covariance2 @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    gap = mean1 - mean2
    squared = gap @ gap + np.trace(covariance1) + np.trace(covariance2) - 2 * cross
    return max(float(squared), 0.0)


def floor(features: np.ndarray, count: int, draws: int = 8, seed: int = 0) -> float:
    """What `count` real samples score against the other real samples, averaged over draws.

    Args:
      features: `[n, d]` real features.
      count: size of the smaller set, in 2..n-2; n // 2 splits into halves.
      draws: random disjoint splits to average.
      seed: of the splits.

    Raises:
      ValueError: `count` leaves fewer than two samples on a side.
    """
    if not 2 <= count <= len(features) - 2:
        raise ValueError(f"cannot split {len(features)} samples into {count} and the rest")
    random = np.random.default_rng(seed)
    total = 0.0
    for _ in range(draws):
        order = random.permutation(len(features))
        total += distance(Moments.of(features[order[:count]]), Moments.of(features[order[count:]]))
    return total / draws
