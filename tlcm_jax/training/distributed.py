"""Joins the processes of a run of several, before anything touches a backend.

Which processes: the three arguments, or the environment variables JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what JAX finds out by itself
under SLURM (`srun`), Open MPI (`mpirun`) and on a TPU pod slice. On one machine without any of
them nothing happens. A launcher that JAX does not know is refused: each of its processes would
train for itself.
"""

import glob
import importlib.util
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree

_LONGEST_MS = 24 * 60 * 60 * 1000
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS = 60
# A process that has not been heard of for so long is taken for dead by the others.
_HEARTBEAT_SECONDS = 60
# Launchers that JAX finds its way with: what says how many processes there are, and what it needs.
_LAUNCHERS = {
    "slurm": ("SLURM_STEP_NUM_TASKS", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")),
    "ompi": ("OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK")),
}
# Counts of processes that other launchers set.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    join_seconds: int = JOIN_SECONDS,
) -> bool:
    """Calls `jax.distributed.initialize` when this process is one of several.

    Call it first thing: before `jax.devices()`, any computation, or an import that does either.
    Calling it again does nothing. Where the others do not come within `join_seconds`, the process
    ends with a message of one line.

    Args:
      coordinator_address: `host:port` of process 0; default JAX_COORDINATOR_ADDRESS.
      num_processes: how many processes; default JAX_NUM_PROCESSES.
      process_id: which one this is, from 0; default JAX_PROCESS_ID.
      join_seconds: how long to wait for the others.

    Returns:
      Whether the process is part of a distributed run.

    Raises:
      ValueError: some of the three values without the others, a value that cannot be, or several
        processes of a launcher that were not joined.
      RuntimeError: the coordinator cannot be reached; or (from JAX) a backend is already in use.
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
        if not 0 <= index < count:
            raise ValueError(
                f"{_VARIABLES[2]} = {index} is none of {count} processes: it counts from 0 to "
                f"{count - 1}"
            )
        until = time.monotonic() + join_seconds
        if index:
            _reach(address, until)
        _join(
            until,
            f"{count} processes did not all join at {address} within {join_seconds} s: start all "
            f"of them, {_VARIABLES[2]} from 0 to {count - 1}, each once, with process 0 at that "
            "address",
            coordinator_address=address,
            num_processes=count,
            process_id=index,
        )
    elif (launcher := _launcher(os.environ)) or on_tpu_slice(os.environ):
        where = launcher or "a TPU slice"
        told = (
            f"the processes of {where} did not all join within {join_seconds} s: start the same "
            f"command on all of them, or set {', '.join(_VARIABLES)}"
        )
        chosen = {"cluster_detection_method": launcher} if launcher else {}
        _join(time.monotonic() + join_seconds, told, **chosen)
    else:
        _refuse_unjoined(os.environ)
        return False
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    return True


def _join(until: float, told: str, **chosen: Any) -> None:
    """Calls JAX, which ends the process with a stack when it waits in vain: we end it before."""
    if _platforms() == ["cpu"]:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    joined = threading.Event()

    def watch() -> None:
        if not joined.wait(max(0.0, until - time.monotonic())):
            end_now(f"error: {told}")

    threading.Thread(target=watch, daemon=True).start()
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **chosen)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise RuntimeError(f"{told} ({reason})") from error
    finally:
        joined.set()


def _reach(address: str, until: float) -> None:
    """Waits until something listens at the coordinator's address.

    Raises:
      ValueError: it is no address.
      RuntimeError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{_VARIABLES[0]} = {address!r}: give HOST:PORT of process 0")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"no answer from process 0 at {address} ({error}): start it, and see that "
                    f"{_VARIABLES[0]} is its address and that the port is open"
                ) from None
            time.sleep(0.5)


def _launcher(environment: Mapping[str, str]) -> str:
    """The launcher of several processes that JAX knows, by its name for it, or ""."""
    for name, (count, needed) in _LAUNCHERS.items():
        several = environment.get(count, "1") not in ("", "1")
        if several and all(variable in environment for variable in needed):
            return name
    return ""


def _refuse_unjoined(environment: Mapping[str, str]) -> None:
    """Raises a ValueError where a launcher says that there are several processes."""
    for count in (*_COUNTS, *(count for count, _ in _LAUNCHERS.values())):
        number = environment.get(count, "")
        if number.isdigit() and int(number) > 1:
            raise ValueError(
                f"{count}={number}: this is one of {number} processes, and nothing says how they "
                f"find each other; set {', '.join(_VARIABLES)} for each, or unset {count} to run "
                "alone"
            )


def end_now(message: str) -> None:
    """Ends a process of several with a message: an orderly end would wait for the others."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def describe_failure(error: Exception) -> str:
    """An error of a run of several processes, in one line; the others' death by its name."""
    text = " ".join(str(error).split())
    lost = ("Gloo", "Connection reset", "Connection closed", "coordination", "heartbeat", "UNAVAIL")
    if any(word in text for word in lost):
        return (
            "another process of this run died or cannot be reached: see its log, and run the same "
            f"command on all of them to resume from the last checkpoint ({text[:200]})"
        )
    return text


def lead_first(call: Callable[[], Any]) -> None:
    """Process 0 does something; where it fails there, all processes end.

    Raises:
      Exception: whatever the call raised, on process 0; on the others a RuntimeError.
    """
    if jax.process_count() == 1:
        call()
        return
    import numpy as np
    from jax.experimental import multihost_utils

    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            call()
        except Exception as error:
            failed = error
    bad = int(multihost_utils.broadcast_one_to_all(np.int32(failed is not None)))
    if failed is not None:
        raise failed
    if bad:
        raise RuntimeError("process 0 ended this run: its log says why")


def wait_for_all(where: str) -> None:
    """Waits until every process has come here, however long one of them still works.

    No device takes part. Alone, nothing happens.

    Args:
      where: a name that is waited at once only.
    """
    ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=_LONGEST_MS)


def local_rows(tree: PyTree) -> tuple[int, PyTree]:
    """What lies on this process's devices of arrays whose leading axis is cut over all of them.

    Returns:
      The first row, and host arrays of the rows, which are neighbours.
    """
    import numpy as np

    def begin(index: tuple) -> int:
        return index[0].start or 0

    def rows(leaf: jax.Array) -> np.ndarray:
        shards = {begin(shard.index): shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    some = jax.tree.leaves(tree)[0]
    first = min(begin(shard.index) for shard in some.addressable_shards)
    return first, jax.tree.map(rows, tree)


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
