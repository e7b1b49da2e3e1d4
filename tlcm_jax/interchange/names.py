"""Names and layouts: one rule between Flax trees and PyTorch checkpoints.

Flax keys are the checkpoint's own path pieces, so a PyTorch key is the path joined with dots and
the leaf renamed to `weight` or `bias`. Linear kernels are transposed, convolutions go between
HWIO and OIHW; embeddings and norms keep their layout.
"""

from collections.abc import Mapping

import flax.traverse_util
import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def torch_key(path: tuple[str, ...]) -> str:
    """The checkpoint's name of a Flax leaf, e.g. `down_blocks.0.resnets.0.conv1.weight`."""
    return ".".join((*path[:-1], _LEAVES[path[-1]]))


def to_torch_layout(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """A Flax leaf in the checkpoint's layout."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def to_flax_layout(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """A checkpoint tensor in the Flax leaf's layout; the inverse of `to_torch_layout`."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """A whole tree as checkpoint names and contiguous arrays."""
    return {
        torch_key(path): np.ascontiguousarray(to_torch_layout(path, np.asarray(leaf)))
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }


def from_torch(tensors: Mapping[str, np.ndarray], shapes: Mapping, source: str) -> dict:
    """A tree of the given structure, filled from a checkpoint.

    Args:
      tensors: checkpoint name to array; read one at a time, so a lazy mapping streams.
      shapes: tree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`) to fill.
      source: what the tensors came from, for errors.

    Returns:
      The tree of numpy arrays in the leaves' dtypes.

    Raises:
      ValueError: a tensor is missing, left over or misshaped; the first ten are named.
    """
    wanted = flax.traverse_util.flatten_dict(shapes)
    names = {torch_key(path): path for path in wanted}
    # Buffers that older libraries stored; they hold no weights.
    extra = [n for n in tensors if n not in names and not n.endswith("position_ids")]
    missing = [n for n in names if n not in tensors]
    problems = [f"missing {n}" for n in missing] + [f"unexpected {n}" for n in extra]
    filled = {}
    if not problems:
        for name, path in names.items():
            value = to_flax_layout(path, tensors[name])
            if value.shape != wanted[path].shape:
                problems.append(f"{name} has shape {value.shape}, expected {wanted[path].shape}")
                continue
            filled[path] = np.asarray(value, dtype=wanted[path].dtype)
    if problems:
        raise ValueError(
            f"{source} does not fit its config: {'; '.join(problems[:10])}"
            + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        )
    return flax.traverse_util.unflatten_dict(filled)
