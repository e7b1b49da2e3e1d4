"""How arrays that are not a batch lie on the mesh: ordered (regex, rule) pairs.

A leaf's name is its path joined with '/', for example
`opt_state/1/0/mu/down_blocks.0/attentions.1/proj_in/kernel`; the first regex found in it decides.
The moments of an optimiser carry their parameter's path and shape, so they land where it does.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tlcm_jax.training.mesh import make_mesh

PyTree = Any
Rule = Callable[[tuple[int, ...], Mesh], P]
Rules = Sequence[tuple[str, Rule]]


def replicate(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Rule: the whole array on every device."""
    del shape, mesh
    return P()


def fsdp(min_size: int) -> Rule:
    """Rule: split the largest axis that `fsdp` divides, if the array is large enough.

    Args:
      min_size: elements below which an array is replicated: gathering a small array costs more
        time than keeping it costs memory.

    Returns:
      A rule. Of equally long axes it takes the last, the output features of a kernel.
    """

    def rule(shape: tuple[int, ...], mesh: Mesh) -> P:
        ways = mesh.shape["fsdp"]
        divisible = [axis for axis, length in enumerate(shape) if length and length % ways == 0]
        if ways == 1 or not divisible or np.prod(shape) < min_size:
            return P()
        chosen = max(divisible, key=lambda axis: (shape[axis], axis))
        return P(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))

    return rule


# Everything that is trained or frozen follows one rule; with `fsdp` of size 1 it replicates.
RULES: Rules = ((r".*", fsdp(min_size=2**16)),)


def leaf_name(path: tuple) -> str:
    """The name of a leaf: its path's pieces joined with '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(tree: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """The sharding of every leaf.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: the mesh.
      rules: ordered (regex, rule) pairs; the first regex that `re.search` finds decides.

    Returns:
      A pytree of `NamedSharding` with the same structure.

    Raises:
      ValueError: a leaf that no regex matches.
    """

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        for pattern, rule in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, rule(tuple(np.shape(leaf)), mesh))
        raise ValueError(f"no sharding rule matches {name!r}: end the rules with ('.*', replicate)")

    return jax.tree_util.tree_map_with_path(choose, tree)


def on_local_devices() -> Callable[[PyTree], PyTree] | None:
    """Shardings that put a tree whole onto every local device, over which batches are then cut.

    None where there is one device.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    mesh = make_mesh({"data": -1, "fsdp": 1}, devices)
    return functools.partial(tree_shardings, mesh=mesh)


def place(tree: PyTree, mesh: Mesh | None, rules: Rules = RULES) -> PyTree:
    """Puts parameters where the rules say.

    Args:
      tree: pytree of host or device arrays, the same on every process.
      mesh: the mesh; None leaves everything on the default device.
      rules: see `tree_shardings`.

    Returns:
      A pytree of global arrays. Leaves that already lie there are not copied.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        # No communication: each process cuts its shards out of its own copy.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, tree_shardings(tree, mesh, rules))


def to_host(tree: PyTree) -> PyTree:
    """Whole host copies of arrays that lie on a mesh, on every process; all of them call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
