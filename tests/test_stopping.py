"""The main command as a supervisor meets it: one run a workdir, exit codes that say what to do."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
from ml_collections import ConfigDict

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import main, paths

RECIPE = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        name="tiny",
        model=dict(path="{teacher}"),
        prompts=("{prompts}",),
        stages=dict(only=dict(
            objective="mlcd", steps=10_000, batch_size=2, learning_rate=1e-3,
            settings=dict(segments=2, points_per_segment=1, guidance_scale=2.0),
        )),
        export=(),
    ))
"""


def start(folder):
    command = [sys.executable, "-m", "tlcm_jax.main", "--noprogress", "--compilation_cache", ""]
    return subprocess.Popen(
        [*command, "--config", str(folder / "recipe.py"), "--workdir", str(folder / "run")],
        cwd=paths.ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def test_a_second_run_is_kept_off_and_sigterm_before_the_first_step_ends_the_first(tmp_path):
    teacher, prompts = write_tiny_pipeline(tmp_path / "teacher"), tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na cat icon\n")
    (tmp_path / "recipe.py").write_text(RECIPE.format(teacher=teacher, prompts=prompts))
    first = start(tmp_path)
    try:
        lock = tmp_path / "run/.lock"
        until = time.monotonic() + 300
        while not (lock.exists() and lock.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        second = start(tmp_path)
        _, said = second.communicate(timeout=300)
        assert second.returncode == 1
        assert f"run is in use by process {first.pid} on " in said.splitlines()[-1]
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=300)
        assert first.returncode == 75
        assert "asked to stop: nothing was unsaved" in said.splitlines()[-1]
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize(("finished", "code"), [(True, None), (False, 75)])
def test_a_run_that_was_stopped_exits_with_tempfail(monkeypatch, finished, code):
    def flag(value):
        return types.SimpleNamespace(value=value)

    for name, value in {"CONFIG": ConfigDict(), "WORKDIR": "run", "PROGRESS": False, "PROFILE": "",
                        "CACHE": "", "JOIN": 1, "DEBUG": 0}.items():  # fmt: skip
        monkeypatch.setattr(main, f"_{name}", flag(value))
    monkeypatch.setattr(main.compilation, "use_cache", lambda value: None)
    monkeypatch.setattr(main, "run", lambda *args, **kwargs: finished)
    if code is None:
        main.main(["main"])
    else:
        with pytest.raises(SystemExit) as ended:
            main.main(["main"])
        assert ended.value.code == code
