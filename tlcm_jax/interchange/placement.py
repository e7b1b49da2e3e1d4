"""From views of a file to arrays where they are used, one tensor at a time.

A tensor is read, cast and laid out in one pass, straight to its devices: beside the arrays that
are wanted, at most one tensor is held (the largest), whatever the file's size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from tlcm_jax.interchange.names import Path_

Shardings = Callable[[Any], Any]


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
    most = max(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    filled: dict[Path_, jax.Array] = {}
    held: list[jax.Array] = []
    for path, view in views.items():
        leaf = wanted[path]
        if sum(array.nbytes for array in held) + leaf.size * leaf.dtype.itemsize > most:
            # Transfers still under way hold their source: wait, so that they do not add up.
            jax.block_until_ready(held)
            held.clear()
            release()
        filled[path] = _put(view, leaf, placed.get(path))
        held.append(filled[path])
    jax.block_until_ready(held)
    release()
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
