"""Several processes of one distributed run, on this machine: their environment, and their end."""

import os
import socket


def environments(count, flags):
    """The environment of each of `count` processes that find one another; `flags` are XLA's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
    }
    return [{**shared, "JAX_PROCESS_ID": str(rank)} for rank in range(count)]


def all_end_well(processes):
    """Waits for processes whose output is a pipe; shows all of it if one fails."""
    try:
        output = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(output)
