"""Provenance names what made a run."""

import jax
import pytest

from tlcm_jax.evaluation.reporting import provenance as module
from tlcm_jax.evaluation.reporting.provenance import duration, provenance


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (725, "12 min 5 s"),
        (3600, "1 h 0 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_provenance():
    facts = provenance(61)
    assert facts["duration"] == "1 min 1 s"
    assert facts["devices"] == "8 × cpu (cpu)"
    assert f"jax {jax.__version__}," in facts["versions"]
    assert all(isinstance(text, str) and text for text in facts.values())


def test_a_package_that_is_not_installed_is_said_and_no_error(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("no-such-package", "jax"))
    assert provenance(1)["versions"] == f"no-such-package (not installed), jax {jax.__version__}"
