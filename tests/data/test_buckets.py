"""The size of each refill: a function of its number, by weight."""

import itertools

import pytest

from tlcm_jax.data.buckets import Buckets
from tlcm_jax.io.image_size import ImageSize

SIZES = tuple(ImageSize.read(text) for text in ("1024", "1216x832", "832x1216"))


def drawn(weights, count, seed=0):
    buckets = Buckets(tuple(zip(SIZES, weights, strict=False)), seed)
    return [buckets.at(refill) for refill in range(count)]


@pytest.mark.parametrize("weights", [(1, 1, 1), (4.0, 2.0, 1.0), (0.9, 0.05, 0.05)])
@pytest.mark.parametrize("seed", [0, 1, 1001])
def test_shares_are_the_weights_soon_and_late(weights, seed):
    found = drawn(weights, 3000, seed)
    for size, weight in zip(SIZES, weights, strict=True):
        share = weight / sum(weights)
        seen = itertools.accumulate(each == size for each in found)
        assert max(abs(n - share * i) for i, n in enumerate(seen, 1)) < 4


def test_stages_of_other_seeds_begin_elsewhere():
    assert drawn((1, 1, 1), 20) == drawn((1, 1, 1), 20) != drawn((1, 1, 1), 20, seed=1)
    # Far on no digits are lost.
    buckets = Buckets(tuple(zip(SIZES, (1, 1, 1), strict=True)), 0)
    assert len({buckets.at(10**12 + i) for i in range(6)}) == 3


def test_one_bucket_is_always_drawn():
    assert set(drawn((0.3,), 50)) == {SIZES[0]}
