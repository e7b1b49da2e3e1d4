"""launch/tpu_slice.sh: what it does on the workers of a slice, against a fake gcloud."""

import json
import os
import subprocess
import time
from pathlib import Path

from tests.support.fake_gcloud import FAST, SLICE, state, write_program

RUN = [
    "run",
    *SLICE,
    *FAST,
    "--config",
    "configs/it's.py:a=1,b='x y'",
    "--workdir",
    "gs://bucket/r s",
]


def arguments_of(cloud, worker: int) -> list[str]:
    path = cloud.folder / f"worker{worker}" / "arguments.json"
    for _ in range(200):
        if path.exists() and path.read_text().endswith("]"):
            return json.loads(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"worker {worker} never started")


def test_run_starts_main_on_every_worker_with_exact_arguments(installed):
    done = installed(*RUN, "--", "--config.prompts=$(touch hacked) `id` \"'\\", "--x")
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        assert arguments_of(installed, worker) == [
            "-u",
            "-m",
            "tlcm_jax.main",
            "--config=configs/it's.py:a=1,b='x y'",
            "--workdir=/gcs/bucket/r s",
            "--config.prompts=$(touch hacked) `id` \"'\\",
            "--x",
        ]
        mounted = (installed.folder / f"worker{worker}" / "mounted.txt").read_text()
        assert mounted.startswith("--implicit-dirs") and mounted.endswith(" bucket /gcs/bucket\n")
        # One worker must see at once what another has written.
        assert "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0" in mounted
    assert not list(installed.folder.rglob("hacked"))
    assert done.stdout.count("started") == 2


def test_a_mounted_bucket_is_left_alone(installed, monkeypatch):
    monkeypatch.setenv("MOUNTED", "0")
    assert installed(*RUN).returncode == 0
    assert arguments_of(installed, 1)[4] == "--workdir=/gcs/bucket/r s"
    assert not list(installed.folder.rglob("mounted.txt"))


def test_a_bucket_that_cannot_be_mounted_starts_nothing(installed):
    write_program(installed.folder / "bin" / "gcsfuse", "#!/bin/sh\necho denied >&2\nexit 1\n")
    done = installed(*RUN, "--retries", "0")
    assert done.returncode == 1
    assert "denied" in done.stderr
    assert not list(installed.folder.rglob("run.pid"))


def is_training(pid: int) -> bool:
    try:
        return "tlcm_jax.main" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def test_one_run_at_a_time_and_stop(installed, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINING_SECONDS", "60")
    assert installed(*RUN).returncode == 0
    pids = [(installed.folder / f"worker{w}/tlcm/run.pid").read_text() for w in range(2)]
    second = installed(*RUN)
    assert second.returncode == 3
    assert "a run is going on" in second.stderr and "end it with stop first" in second.stderr
    assert installed.verbs() == ["ssh", "ssh"]  # a refusal is not tried again
    assert installed("setup", *SLICE, *FAST).returncode == 3

    installed.plan(describe=[state("ACTIVE")])
    assert installed("status", *SLICE).stdout.count("running") == 2
    assert installed("stop", *SLICE).stdout.count("stopped") == 2
    assert not any(is_training(int(pid)) for pid in pids)
    installed.plan(describe=[state("ACTIVE")])
    ended = installed("status", *SLICE).stdout
    assert ended.count("ended") == 2 and "last line: training" in ended
    assert installed("stop", *SLICE).stdout.count("nothing is running") == 2
    assert "training" in installed("logs", *SLICE, "--worker", "1").stdout


def test_a_broken_connection_is_tried_again_and_starts_nothing_twice(installed, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINING_SECONDS", "60")
    installed.plan(ssh=[{"status": 255}])
    try:
        done = installed(*RUN)
        assert done.returncode == 0
        assert "try 1 of 3" in done.stderr
        first, again = installed.calls()
        assert first == again  # the same run id, so a worker that had begun only says so
        command = next(a for a in again if a.startswith("--command=")).removeprefix("--command=")
        home = installed.folder / "worker0"
        pid = (home / "tlcm/run.pid").read_text()
        repeated = subprocess.run(
            ["bash", "-c", command],
            cwd=home,
            env=dict(os.environ, HOME=str(home)),
            capture_output=True,
            text=True,
        )
        assert repeated.returncode == 0 and "started" in repeated.stdout
        assert (home / "tlcm/run.pid").read_text() == pid
    finally:
        installed("stop", *SLICE)


def test_run_before_setup_says_so(cloud):
    done = cloud(*RUN)
    assert done.returncode == 3
    assert "not installed: run setup first" in done.stderr


def test_logs_before_run_says_so(cloud):
    done = cloud("logs", *SLICE)
    assert done.returncode == 3
    assert "nothing was run here" in done.stderr


def test_setup_installs_the_last_commit(cloud):
    # A stand-in for python3 that records pip and uv, and for what `uv venv` makes.
    write_program(
        cloud.folder / "bin" / "python3",
        '#!/bin/sh\necho "$*" >> ~/installed.txt\n'
        'if [ "$3" = venv ]; then mkdir -p ~/tlcm/venv/bin; cp "$0" ~/tlcm/venv/bin/python; fi\n',
    )
    write_program(cloud.folder / "bin" / "gcsfuse", "#!/bin/sh\n")
    (cloud.clone / "configs" / "uncommitted.py").write_text("")
    done = cloud("setup", *SLICE, *FAST)
    assert done.returncode == 0, done.stderr
    assert "uncommitted changes" in done.stderr
    for worker in range(2):
        home = cloud.folder / f"worker{worker}"
        assert (home / "tlcm/source/configs/it's.py").exists()
        assert not (home / "tlcm/source/configs/uncommitted.py").exists()
        steps = (home / "installed.txt").read_text().splitlines()
        assert steps[0].startswith("-m pip install")
        assert steps[1].startswith("-m uv venv") and "--python 3.12" in steps[1]
        assert "tlcm/source jax[tpu]" in steps[2]
        assert "jax.distributed.initialize()" in steps[3]
