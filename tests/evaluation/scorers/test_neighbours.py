"""Precision and recall: against distances taken one by one, and where the answer is known."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from tlcm_jax.evaluation.scorers import neighbours
from tlcm_jax.evaluation.scorers.neighbours import precision_recall


def by_tree(by: np.ndarray, points: np.ndarray, k: int) -> float:
    tree = cKDTree(by)
    radii = tree.query(by, k + 1)[0][:, -1]
    return float(np.mean([(np.linalg.norm(by - x, axis=1) <= radii).any() for x in points]))


@pytest.mark.parametrize("k", [1, 3])
def test_equals_scipys_neighbours(k, monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS", 32)  # in parts, the last of them shorter
    rng = np.random.default_rng(0)
    real, samples = rng.normal(size=(150, 4)), 0.7 * rng.normal(size=(110, 4)) + 0.5
    precision, recall = precision_recall(real, samples, k)
    assert precision == pytest.approx(by_tree(real, samples, k), abs=1e-12)
    assert recall == pytest.approx(by_tree(samples, real, k), abs=1e-12)
    assert 0.3 < recall < precision < 1  # the samples are narrower


def test_a_lost_mode_costs_recall_and_foreign_samples_precision():
    rng = np.random.default_rng(1)
    modes = np.repeat([[0.0, 0.0], [100.0, 0.0]], 50, axis=0)
    real = modes + rng.normal(size=(100, 2))
    one = rng.normal(size=(100, 2))
    precision, recall = precision_recall(real, one)
    assert precision > 0.9 and recall <= 0.5
    foreign = np.concatenate([one[:50], one[50:] + [0, 1000.0]])
    assert precision_recall(real, foreign)[0] <= 0.5
    assert precision_recall(real, real) == (1.0, 1.0)


def test_too_few_or_broken_are_refused():
    with pytest.raises(ValueError, match="3 images have no 3 neighbours: give at least 4"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(np.zeros((9, 2)), np.full((9, 2), np.nan))
