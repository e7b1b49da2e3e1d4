"""Readers of damaged files: a fixed handful of cases of every kind; and that the watch sees."""

import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import mutations
from benchmarks.fuzz.watch import Guard, run
from benchmarks.fuzz_readers import case, targets

SLOW = ("CLIP weights", "miniature's judge.json", "miniature's judge.safetensors")


@functools.cache
def guard():
    return Guard()


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    return folder, [target for target in targets(folder) if target.name not in SLOW]


def test_every_valid_file_is_read(readers):
    folder, found = readers
    assert len(found) > 30
    for target in found:
        outcome = run(lambda t=target: t.read(random.Random(0)), 10**9, guard(), folder)
        assert outcome.kind == "ok", (target.name, outcome.text)


def test_damaged_files_are_read_or_refused_in_a_line(readers):
    folder, found = readers
    for number in range(400):
        target, _, outcome = case(number, 7, found, guard(), folder)
        assert outcome.good, (number, target.name, outcome.kind, outcome.text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(value=JSON, field=st.integers(0, 30), number=st.integers(0, 10**6))
def test_any_value_in_any_field_of_any_config(readers, value, field, number):
    import json

    folder, found = readers
    configs = [target for target in found if target.kind == "json"]
    target = configs[number % len(configs)]
    valid = target.file.read_bytes()
    raw = json.loads(valid)
    if isinstance(raw, dict):
        raw[list(raw)[field % len(raw)]] = value
    else:
        raw[field % len(raw)] = value
    target.file.write_text(json.dumps(raw))
    try:
        outcome = run(lambda: target.read(random.Random(0)), 10**5, guard(), folder)
    finally:
        target.file.write_bytes(valid)
    assert outcome.good, (target.name, raw, outcome.text)


@pytest.mark.parametrize("kind", mutations.CHANGES)
def test_changes_are_repeated_by_their_number(readers, kind):
    _, found = readers
    data = next(target.file.read_bytes() for target in found if target.kind == kind)
    made = [[mutations.changed(kind, random.Random(i), data) for i in range(20)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 10


def test_the_watch_sees(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()

    def refuse(error):
        raise error

    def watched(read, size=1, limit=5.0):
        return run(read, size, guard(), inside, limit=limit).kind

    assert watched(lambda: (inside / "x").write_text("")) == "ok"
    assert watched(lambda: refuse(ValueError("no"))) == "refused"
    assert watched(lambda: refuse(ValueError("no\nmore"))) == "trace"
    assert watched(lambda: refuse(KeyError("no"))) == "trace"
    assert watched(lambda: (outside / "x").write_text("")) == "escape"
    assert watched(lambda: (outside / "y").mkdir()) == "escape"
    assert watched(lambda: subprocess.run(["true"], check=True)) == "escape"
    assert watched(lambda: bytearray(300 * 2**20)) == "memory"
    assert watched(lambda: bytearray(300 * 2**20), size=100 * 2**20) == "ok"

    def spin():
        while True:
            pass

    assert watched(spin, limit=0.2) == "hang"


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fuzz_readers", "--output", str(tmp_path)]
    for count, done in ((500, 500), (600, 600)):
        found = subprocess.run([*command, "--count", str(count)], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]
        assert f'"done": {done}' in (Path(tmp_path) / "summary.json").read_text()
