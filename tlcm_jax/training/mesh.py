"""The device mesh: axes `data` and `fsdp`, and what a batch must be for it.

The batch is split over both axes; `fsdp` additionally splits large parameters (see
`sharding`). The same code runs on one CPU, on simulated devices, on a GPU and on a pod.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as a mesh.

    Args:
      axes: sizes of `data` and `fsdp`; one of them may be -1, which takes what is left. An axis
        not named has size 1.
      devices: the devices to use; by default all of them, over all processes.

    Returns:
      A mesh with axes `AXES`, both Auto: the compiler propagates shardings. (Explicit axes, the
      default of JAX, refuse convolutions with sharded kernels.)

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(axes, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(axes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """The sizes of `AXES` on so many devices; arguments and errors are those of `make_mesh`."""
    unknown = set(axes) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axis {sorted(unknown)}: the axes are {list(AXES)}")
    sizes = {name: int(axes.get(name, 1)) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh sizes must be positive, at most one of them -1 (the rest), got {sizes}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"a mesh of {wanted} does not fit {count} devices: choose sizes whose product is "
            f"{count}, or set data=-1 with an fsdp that divides {count}"
        )
    return tuple(sizes.values())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every device, the other axes whole."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def known_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """A context in which what is traced knows the mesh; none where it is None.

    The compiler cuts all else by itself; kernels of our own must be told how a batch lies.
    """
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def traced_on(mesh: Mesh | None, function: Callable) -> Callable:
    """The function, to be jitted, traced in the context of `known_mesh`."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with known_mesh(mesh):
            return function(*args, **kwargs)

    return traced


def check_batch(
    mesh: Mesh | AbstractMesh | None, batch_size: int, what: str = "the batch size"
) -> None:
    """Raises unless the mesh can divide a batch evenly.

    Args:
      mesh: the mesh; None means one device, which divides everything.
      batch_size: examples in the whole batch, over all processes.
      what: how the message names the number, so that the reader finds it in the config.

    Raises:
      ValueError: with both numbers and the nearest batch sizes that work.
    """
    if mesh is None:
        return
    count = mesh.size
    if batch_size % count:
        below, above = batch_size // count * count, -(-batch_size // count) * count
        nearest = f"{below} or {above}" if below else f"{above}"
        layout = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"{what} is {batch_size}, which the {count} devices of the mesh ({layout}) cannot "
            f"divide: set it to {nearest}, or use fewer devices"
        )


def shard_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Puts this process's rows of a batch on its devices.

    Args:
      mesh: the mesh, or None for the default device.
      batch: pytree of host arrays `[b_local, ...]`, the rows of this process in process order;
        on a mesh of one process's devices that is the whole batch.

    Returns:
      The same pytree of global arrays `[b, ...]`, sharded by `batch_sharding`.

    Raises:
      ValueError: rows that the devices of this process cannot divide.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = batch_sharding(mesh)
    processes = len({device.process_index for device in mesh.devices.flat})

    def put(leaf: Any) -> jax.Array:
        check_batch(mesh, np.shape(leaf)[0] * processes)
        if processes == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(put, batch)
