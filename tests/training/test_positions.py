"""What a checkpoint says of where it stands: read, or refused by name."""

import json

import pytest

from tlcm_jax.training import integrity
from tlcm_jax.training.positions import (
    Position,
    describe,
    newest_whole,
    read_position,
    read_record,
)
from tlcm_jax.training.retention import Record

GOOD = describe(Position(1, "second", 3, 7), Record(total=7, stage_end=True, metric=0.5), "loss")


def write(folder, stored, sums=False):
    (folder / "position").mkdir(parents=True, exist_ok=True)
    (folder / "position/metadata").write_text(json.dumps(stored))
    if sums:
        integrity.write_sums(folder)
    return folder


def test_what_is_written_is_read(tmp_path):
    folder = write(tmp_path / "7", GOOD)
    assert read_position(folder) == Position(1, "second", 3, 7)
    assert read_record(folder, "loss") == Record(total=7, stage_end=True, metric=0.5)
    assert read_record(folder, "error") == Record(total=7, stage_end=True)
    assert read_record(tmp_path / "8", "loss") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(total=8), "it is of step 3, 8 in all"),
        (dict(step=9), "it is of step 9, 7 in all"),
        (dict(stage=-1), "in all"),
        (dict(stage=0), "its first stage is at step 3"),
        (dict(step="3"), "its step is '3'"),
        (dict(name=None), "its name is None"),
        (dict(format=3), "of format 3, and this version reads up to 2"),
    ],
)
def test_what_contradicts_itself_or_is_newer_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_position(write(tmp_path / "7", {**GOOD, **change}))


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    write(tmp_path / "6", {**GOOD, "total": 6}, sums=True)
    write(tmp_path / "7", {**GOOD, "format": 9}, sums=True)
    with pytest.raises(ValueError, match="/7 cannot be read: it is of format 9"):
        newest_whole(tmp_path, [6, 7])


def test_the_newest_that_is_whole_goes_before_newer_ones_without_a_list(tmp_path):
    for total, sums in ((5, True), (6, True), (7, False)):
        write(tmp_path / str(total), {**GOOD, "total": total}, sums=sums)
    assert newest_whole(tmp_path, [5, 6, 7]) == (6, {7: "SHA256SUMS is missing"})
    (tmp_path / "6/position/metadata").write_text("")
    total, damaged = newest_whole(tmp_path, [5, 6, 7])
    assert total == 5 and damaged[6] == "position/metadata has changed since it was saved"
    assert newest_whole(tmp_path, []) == (None, {})
