"""Batches of one shape, so that what runs on them is compiled once."""

from collections.abc import Iterator

import numpy as np


def whole_batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Rows `[size]` of one batch after another, until all of `count` rows have had their turn.

    Places that the last batch has left over repeat the last row; of what the batches give,
    joined, the first `count` are wanted.
    """
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)
