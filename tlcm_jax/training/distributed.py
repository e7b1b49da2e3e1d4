"""Joins the processes of a multi-host run, before anything touches a backend.

Which processes: the three arguments, or the environment variables JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or, on a TPU pod slice, what JAX
finds out by itself. On one machine without them nothing happens.
"""

import glob
import importlib.util
import os
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp
from absl import logging

_LONGEST_MS = 24 * 60 * 60 * 1000
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
    """Calls `jax.distributed.initialize` when this process is one of several.

    Call it first thing: before `jax.devices()`, any computation, or an import that does either.
    Calling it again does nothing.

    Args:
      coordinator_address: `host:port` of process 0; default JAX_COORDINATOR_ADDRESS.
      num_processes: how many processes; default JAX_NUM_PROCESSES.
      process_id: which one this is, from 0; default JAX_PROCESS_ID.

    Returns:
      Whether the process is part of a distributed run.

    Raises:
      ValueError: some of the three values without the others, or a value that is no number.
      RuntimeError: (from JAX) a backend is already in use, or the coordinator does not answer.
    """
    if jax.distributed.is_initialized():
        return True
    given = (coordinator_address, num_processes, process_id)
    values = [
        os.environ.get(variable) if value is None else value
        for value, variable in zip(given, _VARIABLES, strict=True)
    ]
    if any(value not in (None, "") for value in values):
        missing = [v for v, value in zip(_VARIABLES, values, strict=True) if value in (None, "")]
        if missing:
            raise ValueError(
                f"a distributed run needs {', '.join(_VARIABLES)}: set {' and '.join(missing)} too"
            )
        address, count, index = str(values[0]), _integer(values, 1), _integer(values, 2)
        if _platforms() == ["cpu"]:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index)
    elif on_tpu_slice(os.environ):
        jax.distributed.initialize()
    else:
        return False
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    return True


def wait_for_all(where: str) -> None:
    """Waits until every process has come here, however long one of them still works.

    No device takes part. Alone, nothing happens.

    Args:
      where: a name that is waited at once only.
    """
    ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=_LONGEST_MS)


def on_tpu_slice(environment: Mapping[str, str]) -> bool:
    """Whether this machine is a worker of a TPU slice, found out without starting a backend.

    Args:
      environment: environment variables.

    Returns:
      False where JAX_PLATFORMS excludes the TPU or its library is not installed; otherwise True
      on a slice with several workers (as GKE or the TPU runtime name them) and on a TPU VM,
      which asks its metadata server for the others.
    """
    platforms = _platforms(environment)
    if platforms and "tpu" not in platforms:
        return False
    if importlib.util.find_spec("libtpu") is None:
        return False
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(workers) > 1 or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in environment


def _platforms(environment: Mapping[str, str] = os.environ) -> list[str]:
    named = environment.get("JAX_PLATFORMS", "")
    return [name.strip() for name in named.split(",") if name.strip()]


def _integer(values: list, which: int) -> int:
    try:
        return int(values[which])
    except ValueError:
        raise ValueError(
            f"{_VARIABLES[which]} must be a whole number, got {values[which]!r}"
        ) from None
