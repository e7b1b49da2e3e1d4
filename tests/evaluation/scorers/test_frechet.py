"""Frechet distance against closed forms, and against SciPy's matrix square root."""

import numpy as np
import pytest

from tlcm_jax.evaluation.scorers import frechet
from tlcm_jax.evaluation.scorers.frechet import Moments


def _covariance(random, size, rank=None):
    factor = random.normal(size=(size, rank or 2 * size))
    return factor @ factor.T / size


def test_diagonal_gaussians_have_the_closed_form():
    random = np.random.default_rng(0)
    mean1, mean2 = random.normal(size=(2, 7))
    sd1, sd2 = random.uniform(0.1, 3, size=(2, 7))
    expected = ((mean1 - mean2) ** 2).sum() + ((sd1 - sd2) ** 2).sum()
    value = frechet.gaussian_distance(mean1, np.diag(sd1**2), mean2, np.diag(sd2**2))
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_equals_scipys_matrix_square_root(rank):
    linalg = pytest.importorskip("scipy.linalg", reason="the oracle is SciPy's sqrtm")
    random = np.random.default_rng(1)
    mean1, mean2 = random.normal(size=(2, 24))
    first, second = _covariance(random, 24, rank), _covariance(random, 24)
    # SciPy's root of a singular product is only good to about 1e-6.
    root = np.trace(linalg.sqrtm(first @ second).real)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    value = frechet.gaussian_distance(mean1, first, mean2, second)
    assert value == pytest.approx(expected, rel=1e-10 if rank is None else 1e-5)
    assert frechet.gaussian_distance(mean2, second, mean1, first) == pytest.approx(value, rel=1e-9)


def test_is_zero_on_itself_even_where_the_covariance_is_singular():
    random = np.random.default_rng(2)
    moments = Moments.of(random.normal(size=(10, 64)))  # rank 9 of 64
    assert 0 <= frechet.distance(moments, moments) < 1e-5


def test_streaming_equals_one_batch_far_from_the_origin():
    features = 1e4 + np.random.default_rng(3).normal(size=(501, 12))
    streamed = Moments.empty(12)
    for start in range(0, 501, 64):
        streamed = streamed.update(features[start : start + 64])
    assert streamed.count == 501
    np.testing.assert_allclose(streamed.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.T), rtol=1e-9, atol=1e-10)


def test_floor_falls_as_one_over_the_sample_size():
    features = np.random.default_rng(4).normal(size=(20000, 8))
    few, many = frechet.floor(features, 100), frechet.floor(features, 1000)
    assert few / many == pytest.approx(10, rel=0.3)
    # For N(0, I): the mean contributes d / n, the covariance about d (d + 1) / 4n.
    assert few == pytest.approx(8 / 100 + 8 * 9 / 400, rel=0.2)
    assert frechet.floor(features, 100) == few


def test_what_cannot_be_compared_says_why():
    features = np.zeros((5, 3))
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        frechet.distance(Moments.of(features[:1]), Moments.of(features))
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet.distance(Moments.of(features), Moments.of(np.zeros((5, 4))))
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match="5 samples into 4"):
        frechet.floor(features, 4)
