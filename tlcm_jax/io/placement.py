"""From views of a file to arrays where they are used, a few tensors at a time.

A tensor is read, cast and laid out in one pass, straight to its devices. Never is more held than
all the arrays that are wanted and, beside them, the largest tensor, whatever the file's size.
"""

import gc
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.io.names import Path_, torch_key

Shardings = Callable[[Any], Any]

_PIECE = 1 << 18
_THREADS = min(16, os.cpu_count() or 1)


def to_host(views: Mapping[Path_, np.ndarray], shapes: Mapping, release: Callable) -> dict:
    """Copies into host memory.

    Args:
      views: as `names.match_tensors` returns them.
      shapes: the tree of `jax.ShapeDtypeStruct`; its dtypes are those of the copies.
      release: called after every copy (`Tensors.release`).

    Returns:
      A tree of numpy arrays that no longer depend on the file.

    Raises:
      ValueError: a value is not a finite number; its tensor is named.
    """
    wanted = flax.traverse_util.flatten_dict(shapes)
    filled = {}
    for path, view in views.items():
        # In the file's own order of bytes: whoever puts it on a device transposes it there.
        check_finite(torch_key(path), view)
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
      views: as `names.match_tensors` returns them.
      shapes: as in `to_host`.
      release: as in `to_host`.
      shardings: a tree of `jax.sharding.Sharding`; by default all lies on the default device. Of
        a tensor that is split over processes, each reads its own part.

    Returns:
      A tree of `jax.Array`s.

    Raises:
      ValueError: a value is not a finite number; its tensor is named.
    """
    wanted = flax.traverse_util.flatten_dict(shapes)
    placed = flax.traverse_util.flatten_dict(shardings or {})
    sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in wanted.items()}
    # What a tensor takes while it is laid out, beside its place: its pages of the file, and the
    # copy that `_put` may make.
    beside = {
        path: view.nbytes + sizes[path] * _copied(view, wanted[path].dtype)
        for path, view in views.items()
    }
    largest = max(view.nbytes for view in views.values())
    room = sum(sizes.values()) + largest
    given = 0
    filled: dict[Path_, jax.Array] = {}
    held: dict[Path_, Future] = {}

    def finish() -> None:
        filled.update({path: array.result() for path, array in held.items()})
        jax.block_until_ready([filled[path] for path in held])
        held.clear()
        # jax lets go of what it copied from at the next garbage collection, of any generation.
        gc.collect(0)
        release()

    # Transposing is slower than reading: a tensor a thread. As long as few have their places there
    # is room for several beside them; towards the end they are waited for, so that what is read
    # does not add up.
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, view in views.items():
            given += sizes[path]
            together = beside[path] + sum(beside[other] for other in held)
            if given + together > room or together > _THREADS * largest:
                finish()
            held[path] = pool.submit(_put, path, view, wanted[path], placed.get(path))
        finish()
    return flax.traverse_util.unflatten_dict(filled)


def check_finite(name: str, view: np.ndarray) -> None:
    """Raises a ValueError that names a tensor with a value that is not a finite number.

    By the bits of the exponent, a piece at a time: a fraction of the time that reading takes.
    """
    if not jnp.issubdtype(view.dtype, jnp.floating) or view.dtype.itemsize == 1:
        return
    unsigned = np.dtype(f"u{view.dtype.itemsize}")
    infinity = np.asarray(np.inf, view.dtype).view(unsigned)
    # In the file's order, which is no copy.
    flat = view.transpose(np.argsort(view.strides)[::-1]).reshape(-1).view(unsigned)
    for start in range(0, flat.size, _PIECE):
        if np.any(flat[start : start + _PIECE] & infinity == infinity):
            raise ValueError(
                f"{name} holds values that are not finite (NaN or infinity): the file is damaged, "
                "or its training diverged"
            )


def _put(path: Path_, view: np.ndarray, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
    def read(index: Any) -> np.ndarray:
        part = view[index]
        check_finite(torch_key(path), part)
        # In the file's order; the device's copy transposes.
        return part.astype(leaf.dtype) if _copied(part, leaf.dtype) else part

    if sharding is None:
        return jax.device_put(read(...))
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _copied(view: np.ndarray, dtype: np.dtype) -> bool:
    """Whether a view is copied on the way.

    It is to be cast; or it is contiguous, and a device might use it in place, while the file may
    change under it.
    """
    return view.dtype != dtype or view.flags.c_contiguous
