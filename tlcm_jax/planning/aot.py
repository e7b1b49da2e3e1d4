"""Compiling for a TPU without one: its devices as libtpu describes them, and what went wrong."""

import functools
import os
from collections.abc import Sequence

import jax
from jax.sharding import SingleDeviceSharding

# What libtpu asks its surroundings where there is no TPU, and would wait for an answer.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.lru_cache(maxsize=8)
def devices(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology, such as `v5e:2x2`; programs can be compiled for them.

    Raises:
      ValueError: libtpu is not installed, or has no such topology.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(
            "compiling for a TPU needs its compiler: pip install 'tlcm_jax[plan]' (libtpu, 137 MB)"
        ) from None
    for key, value in _ALONE.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    # A v4's two cores as one device, as JAX runs them.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"libtpu does not describe the topology {name!r}: {reason}") from None


def single_device(name: str) -> SingleDeviceSharding:
    """The first device of a topology, as the place of a program's arguments."""
    return SingleDeviceSharding(devices(name)[0])
