"""From views of a file to arrays where they are used, one tensor at a time.

A tensor is read, cast and laid out in one pass, straight to its devices: beside the arrays that
are wanted, at most one tensor is held, or several that together are no larger than the largest,
whatever the file's size.
"""

import gc
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from tlcm_jax.interchange.names import Path_

Shardings = Callable[[Any], Any]

_THREADS = min(16, os.cpu_count() or 1)


def to_host(views: Mapping[Path_, np.ndarray], shapes: Mapping, release: Callable) -> dict:
    """Copies into host memory.

    Args:
      views: as `names.matched` returns them.
      shapes: the tree of `jax.ShapeDtypeStruct`; its dtypes are those of the copies.
      release: called after every copy (`Tensors.release`).

    Returns:
      A tree of numpy arrays that no longer depend on the file.
    """
    wanted = flax.traverse_util.flatten_dict(shapes)
    filled = {}
    for path, view in views.items():
        # In the file's own order of bytes: whoever puts it on a device transposes it there.
        filled[path] = np.array(view, wanted[path].dtype, order="K")
        release()
    return flax.traverse_util.unflatten_dict(filled)


def to_devices(
    views: Mapping[Path_, np.ndarray],
    shapes: Mapping,
    release: Callable,
    shardings: Mapping | None = None,
) -> dict:
    """Copies to devices.

    Args:
      views: as `names.matched` returns them.
      shapes: as in `to_host`.
      release: as in `to_host`.
      shardings: a tree of `jax.sharding.Sharding`; by default all lies on the default device. Of
        a tensor that is split over processes, each reads its own part.

    Returns:
      A tree of `jax.Array`s.
    """
    wanted = flax.traverse_util.flatten_dict(shapes)
    placed = flax.traverse_util.flatten_dict(shardings or {})
    sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in wanted.items()}
    most = max(sizes.values())
    filled: dict[Path_, jax.Array] = {}
    held: dict[Path_, Future] = {}

    def finish() -> None:
        filled.update({path: array.result() for path, array in held.items()})
        jax.block_until_ready([filled[path] for path in held])
        held.clear()
        # jax lets go of what it copied from at the next garbage collection, of any generation.
        gc.collect(0)
        release()

    # Transposing is slower than reading: a tensor a thread, until together they are as large as
    # the largest. They are then waited for, so that their sources do not add up.
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, view in views.items():
            if sum(sizes[other] for other in held) + sizes[path] > most:
                finish()
            held[path] = pool.submit(_put, view, wanted[path], placed.get(path))
        finish()
    return flax.traverse_util.unflatten_dict(filled)


def _put(view: np.ndarray, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
    def read(index: Any) -> np.ndarray:
        part = view[index]
        if part.dtype != leaf.dtype:
            return part.astype(leaf.dtype)  # keeps the file's order; the device's copy transposes
        # A contiguous view might be used in place, and the file may change under it.
        return part.copy() if part.flags.c_contiguous else part

    if sharding is None:
        return jax.device_put(read(...))
    return jax.make_array_from_callback(leaf.shape, sharding, read)
