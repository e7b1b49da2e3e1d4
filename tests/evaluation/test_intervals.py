"""Intervals of scores against what is known of a mean's spread."""

import numpy as np
import pytest

from tlcm_jax.evaluation.intervals import bootstrap_intervals
from tlcm_jax.evaluation.scorers.base import Scorer


class Mean(Scorer):
    name = "mean"


def test_the_interval_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    (low, high) = bootstrap_intervals(Mean(), {"mean": values})["mean"]
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_intervals(Mean(), {"mean": np.full(5, 2.0)}) == {"mean": (2.0, 2.0)}


def test_features_have_none():
    assert bootstrap_intervals(Mean(), {"features": np.zeros((4, 3))}) == {}
