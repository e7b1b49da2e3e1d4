"""Several processes: when they are joined, and that together they compute the same."""

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
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: made.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *args: made.append(args))
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

    alone = toy.run(tmp_path / "one", [toy.spec(steps=3)])
    # What two processes saved, one restores: the run is finished, so no batch is drawn.
    together = toy.run(shared, [toy.spec(steps=3, batches=toy.die_at(0))])
    toy.assert_close(together.state, alone.state, 1e-5)
    losses = [row["loss"] for row in alone.history]
    for rank in range(2):
        np.testing.assert_allclose(np.load(shared / f"losses{rank}.npy"), losses, rtol=1e-5)
