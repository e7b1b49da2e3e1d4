"""Distances of pairs of pictures, with a distance that can be reckoned by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.evaluation.scorers.pairwise import distances, diversity


def brightness(first, second):
    return jnp.abs(jnp.mean(first - second, axis=(1, 2, 3)))


def grey(*values):
    return np.stack([np.full((4, 4, 3), value, np.uint8) for value in values])


@pytest.mark.parametrize("batch", [2, 3, 50])
def test_each_pair_has_its_own_distance_whatever_the_batches(batch):
    found = distances(brightness, grey(0, 255, 51), grey(0, 0, 102), batch)
    np.testing.assert_allclose(found, [0, 2, 0.4], atol=1e-6)


def test_diversity_is_the_mean_over_pairs_of_draws_of_a_prompt():
    draws = np.stack([grey(0, 100), grey(0, 100), grey(51, 100)])
    # The first prompt: 0, 0.4, 0.4; the second is always the same.
    assert diversity(brightness, draws) == pytest.approx(0.8 / 3 / 2, abs=1e-6)
    assert diversity(brightness, grey(9, 9)[None].repeat(2, 0)) == 0


def test_what_is_no_pair_of_pictures_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        distances(brightness, grey(1) / 255, grey(1))
    with pytest.raises(ValueError, match="pair up"):
        distances(brightness, grey(1), grey(1, 2))
    with pytest.raises(ValueError, match="at least 2 draws"):
        diversity(brightness, grey(1)[None])
