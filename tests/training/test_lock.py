"""One workdir, one run: also where nobody but the file says who holds it."""

import json
import os
import subprocess
import sys

import pytest

from tlcm_jax import paths
from tlcm_jax.training.lock import WorkdirInUseError, WorkdirLock

HOLD = """
import sys, time
from tlcm_jax.training.lock import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def other(path, **changes):
    about = {"host": "another", "process": 7, "beat": 1, "at": "then"}
    (path / ".lock").write_text(json.dumps({**about, **changes}))


def test_a_second_run_is_kept_off_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=paths.ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(WorkdirInUseError, match=f"in use by process {holder.pid} on .*: wait"):
            WorkdirLock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with WorkdirLock(tmp_path) as lock:  # at once, although the dead run's name is there
        lock.check()
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with WorkdirLock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with WorkdirLock(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_another_machine_s_name_is_taken_for_dead_once_it_is_silent(tmp_path, monkeypatch, caplog):
    other(tmp_path)
    with WorkdirLock(tmp_path, watch=0.05):
        assert "last held by process 7 on another" in caplog.text
    other(tmp_path)
    monkeypatch.setattr("tlcm_jax.training.lock.time.sleep", lambda s: other(tmp_path, beat=2))
    with pytest.raises(WorkdirInUseError, match="in use by process 7 on another"):
        WorkdirLock(tmp_path, watch=5).__enter__()
    other(tmp_path)
    monkeypatch.setattr(
        "tlcm_jax.training.lock.time.sleep", lambda s: (tmp_path / ".lock").write_text("")
    )
    with WorkdirLock(tmp_path, watch=600):
        pass  # it said that it ended


def test_a_run_whose_folder_was_taken_ends_and_leaves_the_other_s_name(tmp_path):
    with WorkdirLock(tmp_path, beat=0.01) as lock:
        other(tmp_path)
        lock._thread.join()
        with pytest.raises(WorkdirInUseError, match="taken by process 7 on another"):
            lock.check()
    assert json.loads((tmp_path / ".lock").read_text())["process"] == 7


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"host": "another'])
def test_a_damaged_lock_holds_nobody_up(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with WorkdirLock(tmp_path, watch=600):
        pass
