"""launch/tpu_slice.sh: its command line, against a fake gcloud."""

import json
import os
import shlex
import shutil
import subprocess

import pytest

from tests.support.fake_gcloud import QUEUE, SCRIPT, SLICE, VM, WHERE


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
        (["stop", *SLICE, "--", "--x"], "arguments after -- are for run and keep only"),
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
    for word in (
        "create",
        "setup",
        "run",
        "keep",
        "logs",
        "status",
        "stop",
        "delete",
        "--spot",
        "--yes",
    ):
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
