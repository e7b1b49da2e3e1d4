"""The profiler's flag: what it reads, which steps it traces, and a trace on the disk."""

import jax
import pytest
import toy_regression as toy

from tlcm_jax.training.profile import Profiler, parse_steps


def test_steps_are_read_or_refused():
    assert parse_steps("") is None
    assert parse_steps("10:13") == (10, 13) and parse_steps("7:7") == (7, 7)
    for text in ("10", "13:10", "0:4", "a:b", "1:2:3", " 1:2", "-1:2"):
        with pytest.raises(ValueError, match="give FIRST:LAST, such as 10:13"):
            parse_steps(text)


@pytest.fixture
def traced(monkeypatch):
    """What the profiler does, with the step at which it does it."""
    done = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: done.append(f"to {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append("stop"))
    return done


def test_only_the_steps_asked_for_are_traced(traced):
    with Profiler((2, 3), "here") as profiler:
        for step in range(1, 6):
            profiler.before(step)
            traced.append(step)
    assert traced == [1, "to here", 2, 3, "stop", 4, 5]


def test_a_trace_ends_with_the_run_whatever_ends_it(traced):
    with pytest.raises(KeyboardInterrupt), Profiler((2, 9), "here") as profiler:
        for step in (1, 2, 3):
            profiler.before(step)
        raise KeyboardInterrupt
    assert traced == ["to here", "stop"]


def test_without_steps_or_beyond_the_run_nothing_is_traced(traced):
    for steps in (None, (8, 9)):
        with Profiler(steps, "here") as profiler:
            for step in (1, 2):
                profiler.before(step)
    assert traced == []


def test_a_run_leaves_a_trace(tmp_path):
    folder = tmp_path / "profile"
    toy.run(tmp_path, [toy.spec(steps=4)], profiler=Profiler((2, 3), folder))
    assert [path for path in folder.rglob("*.xplane.pb") if path.stat().st_size > 1000]
