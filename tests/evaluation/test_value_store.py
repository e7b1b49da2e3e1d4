"""Values of images are computed once for a scorer's weights and what is known of the prompts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.scorer_files import write_dinov2
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.evaluation.value_store import ValueStore, fingerprint

ROWS = np.arange(4)


def test_a_fingerprint_is_of_the_weights(tmp_path):
    write_dinov2(folder := tmp_path / "dino")
    np.savez(folder / "real.npz", mu=np.zeros(64), sigma=np.eye(64))
    first, again = (load_scorer("fd_dinov2", str(folder)) for _ in range(2))
    assert fingerprint(first) == fingerprint(again) != ""
    layer = first.params["layernorm"]
    other = {**first.params, "layernorm": {**layer, "bias": layer["bias"] + 1e-3}}
    assert fingerprint(dataclasses.replace(first, params=other)) != fingerprint(first)


@dataclasses.dataclass(frozen=True, eq=False)
class Times(Scorer):
    params: Any
    by: Callable
    name: str = "times"


def scaled(by: float) -> Callable:
    return lambda x: by * x


def test_a_fingerprint_is_of_what_functions_hold():
    weights = {"w": np.ones(2)}
    same = [fingerprint(Times(weights, scaled(2.0))) for _ in range(2)]
    others = [scaled(3.0), functools.partial(scaled, 2.0), functools.partial(scaled, 3.0), scaled]
    assert len({*same, *(fingerprint(Times(weights, by)) for by in others)}) == 5
    assert fingerprint(Times({}, scaled(2.0))) == ""


def store(tmp_path, fingerprint="f", **annotations):
    return ValueStore(tmp_path, "a score", fingerprint, annotations)


def test_values_are_computed_once_for_what_they_depend_on(tmp_path):
    calls = []

    def compute():
        calls.append(0)
        return {"score": np.arange(4.0), "features": np.ones((4, 3))}

    first = store(tmp_path, style=["a"] * 4).values(ROWS, compute)
    again = store(tmp_path, style=["a"] * 4).values(ROWS, compute)
    assert len(calls) == 1
    for key, value in first.items():
        np.testing.assert_array_equal(again[key], value)
    store(tmp_path, style=["b"] * 4).values(ROWS, compute)
    store(tmp_path, "g", style=["a"] * 4).values(ROWS, compute)
    store(tmp_path, style=["a"] * 4).values(ROWS + 4, compute)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not", None])
def test_damaged_values_are_computed_again_and_said(damage, tmp_path, caplog):
    def compute():
        return {"score": np.arange(4.0)}

    kept = store(tmp_path)
    kept.values(ROWS, compute)
    (file,) = tmp_path.rglob("*.npz")
    if damage is None:
        np.savez(file, score=np.arange(3.0))
    else:
        file.write_bytes(damage)
    np.testing.assert_array_equal(kept.values(ROWS, compute)["score"], np.arange(4.0))
    assert "scored again" in caplog.text
