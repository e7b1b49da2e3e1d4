"""Several processes: when they are joined, and that together they compute the same."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_regression as toy

from tests.support.processes import all_end_well, environments
from tlcm_jax.training import distributed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def calls(monkeypatch):
    """What `jax.distributed.initialize` is called with."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    made = []

    def join(heartbeat_timeout_seconds, **chosen):
        made.append(tuple(chosen.values()))

    monkeypatch.setattr(jax.distributed, "initialize", join)
    monkeypatch.setattr(jax.config, "update", lambda *args: made.append(args))
    monkeypatch.setattr(distributed, "_reach", lambda address, until: None)
    return made


def test_alone_nothing_happens(calls):
    assert not distributed.initialize() and not calls


def test_environment_and_arguments_name_the_processes(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:99")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert distributed.initialize(process_id=2)
    assert calls == [("jax_cpu_collectives_implementation", "gloo"), ("host:99", 4, 2)]


def test_half_an_environment_is_refused(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:99")
    with pytest.raises(ValueError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"):
        distributed.initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a whole number, got 'four'"):
        distributed.initialize()
    assert not calls


GLOO = ("jax_cpu_collectives_implementation", "gloo")
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "1"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "2"}, [GLOO, ("slurm",)]),
        ({**OMPI, "OMPI_COMM_WORLD_SIZE": "2"}, [GLOO, ("ompi",)]),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, []),  # one task of `srun`
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, []),  # a batch script
        ({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}, []),
    ],
)
def test_what_jax_joins_by_itself_is_joined(calls, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize() is bool(expected) and calls == expected


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
)
def test_processes_that_did_not_join_are_refused_naming_what_to_set(calls, monkeypatch, name):
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"{name}=4: this is one of 4 .* set JAX_COORDINATOR_ADDR"):
        distributed.initialize()
    assert not calls


@pytest.mark.parametrize(
    ("address", "index", "message"),
    [
        ("localhost:1", 7, "JAX_PROCESS_ID = 7 is none of 2 processes: it counts from 0 to 1"),
        ("localhost:1", -1, "JAX_PROCESS_ID = -1 is none of 2"),
        ("localhost", 1, "JAX_COORDINATOR_ADDRESS = 'localhost': give HOST:PORT of process 0"),
        ("localhost:1", 1, "no answer from process 0 at localhost:1 .*refused.*: start it"),
        ("no-such-host.invalid:1", 1, "no answer from process 0 at no-such-host.invalid:1"),
    ],
)
def test_an_address_or_number_that_cannot_be_is_one_line(monkeypatch, address, index, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        distributed.initialize(address, 2, index, join_seconds=0)


JOIN = """
import sys
from tlcm_jax.training import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), join_seconds=2)
"""


@pytest.mark.parametrize("index", [0, 1])
def test_who_waits_in_vain_ends_with_one_line_and_no_stack(index):
    """As process 0 alone; and where something listens at the address that says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        if index:
            silent.listen()
        else:
            silent.close()
        ended = subprocess.run(
            [sys.executable, "-c", JOIN, address, str(index)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "2 processes did not all join at 127.0.0.1" in said[0]
    assert "Traceback" not in ended.stderr and "***" not in ended.stderr


def test_the_death_of_another_is_said_in_one_line():
    error = RuntimeError("INTERNAL: Gloo AllGather failed:\n Connection reset by peer")
    said = distributed.describe_failure(error)
    assert said.startswith("another process of this run died") and "\n" not in said
    assert distributed.describe_failure(ValueError("seed = 1")) == "seed = 1"


def test_a_slice_is_recognised_without_a_backend(calls, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    assert distributed.on_tpu_slice({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert distributed.on_tpu_slice({"MEGASCALE_COORDINATOR_ADDRESS": "a"})
    assert not distributed.on_tpu_slice({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"})
    # Compiling ahead of time, without a TPU.
    assert not distributed.on_tpu_slice({"TPU_WORKER_HOSTNAMES": "localhost"})
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
    assert distributed.on_tpu_slice({})
    assert not distributed.on_tpu_slice({"TPU_SKIP_MDS_QUERY": "1"})
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # set by JAX where no TPU is
    assert distributed.initialize() and calls == [()]
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert not distributed.on_tpu_slice({"TPU_WORKER_HOSTNAMES": "a,b"})


def test_two_processes_train_as_one(tmp_path):
    shared = tmp_path / "two"
    shared.mkdir()
    script = Path(__file__).with_name("two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(shared)],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments(2, "--xla_force_host_platform_device_count=2")
    ]
    all_end_well(processes)
    assert_trained_as_one(shared, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI 4 (openmpi-bin)")
def test_two_processes_that_mpirun_starts_train_as_one(tmp_path):
    shared = tmp_path / "two"
    shared.mkdir()
    # By the loopback, whatever networks there are; Open MPI's own variables say the rest.
    loopback = [
        word for kind in ("btl", "oob") for word in ("--mca", f"{kind}_tcp_if_include", "lo")
    ]
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", *loopback, "-n", "2"]
    script = Path(__file__).with_name("two_processes.py")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COORD")}
    process = subprocess.Popen(
        [*command, sys.executable, str(script), str(shared)],
        env={
            **ours, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    all_end_well([process])
    assert_trained_as_one(shared, tmp_path)


def assert_trained_as_one(shared, tmp_path):
    alone = toy.run(tmp_path / "one", [toy.spec(steps=3)])
    # What two processes saved, one restores: the run is finished, so no batch is drawn.
    together = toy.run(shared, [toy.spec(steps=3, batches=toy.die_at(0))])
    toy.assert_close(together.state, alone.state, 1e-5)
    losses = [row["loss"] for row in alone.history]
    for rank in range(2):
        np.testing.assert_allclose(np.load(shared / f"losses{rank}.npy"), losses, rtol=1e-5)
