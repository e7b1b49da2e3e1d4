"""A workdir belongs to one config."""

import errno
import json
from pathlib import Path

import pytest

from tlcm_jax.training.workdir import claim_workdir, is_full

CONFIG = {"seed": 0, "mesh": {"data": -1}, "sizes": (1, 2), "log": {"every": 5, "bar": True}}


def test_the_same_config_comes_back(tmp_path):
    claim_workdir(tmp_path / "run", CONFIG)
    claim_workdir(tmp_path / "run", CONFIG)
    assert json.loads((tmp_path / "run/config.json").read_text())["sizes"] == [1, 2]


def test_another_config_is_refused_with_every_key_that_differs(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    other = {"seed": 1, "mesh": {"data": 4}, "sizes": (1, 2), "log": {"every": 9, "bar": True},
             "new": "x"}  # fmt: skip
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        claim_workdir(tmp_path, other, may_change={"log"})
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "mesh.data: -1 -> 4", 'new: (absent) -> "x"', "seed: 0 -> 1",
    ]  # fmt: skip
    assert (tmp_path / "config.json").read_text() == before


def test_exempt_keys_take_their_new_values(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    claim_workdir(tmp_path, {**CONFIG, "log": {"every": 9, "bar": True}}, may_change={"log.every"})
    assert json.loads((tmp_path / "config.json").read_text())["log"]["every"] == 9


def test_unreadable_config_and_full_disk(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for text in ("", "{", "[]", "[" * 100_000, "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match="config.json .*remove that one file.*checkpoints stay"
        ):
            claim_workdir(tmp_path, CONFIG)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left to write .*config.json"):
        claim_workdir(tmp_path / "other", CONFIG)


def test_only_a_full_disk_is_a_full_disk():
    assert is_full(OSError(errno.EDQUOT, "quota"))
    outer = RuntimeError("save failed")
    outer.__cause__ = ValueError("RESOURCE_EXHAUSTED: ... No space left on device [28]")
    assert is_full(outer)
    assert not is_full(PermissionError(errno.EACCES, "no"))
