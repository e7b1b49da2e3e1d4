"""Names and layouts: one rule between Flax trees and PyTorch checkpoints.

Flax keys are the checkpoint's own path pieces, so a PyTorch key is the path joined with dots and
the leaf renamed to `weight` or `bias`. Linear kernels are transposed, convolutions go between
HWIO and OIHW; embeddings and norms keep their layout.
"""

from collections.abc import Collection, Mapping, Sequence

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from absl import logging

from tlcm_jax.io.tensors import Tensors, refuse_quantised

Path_ = tuple[str, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# What diffusers called the autoencoder's attention layers when SD 1.x was published.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_key(path: Path_) -> str:
    """The checkpoint's name of a Flax leaf, e.g. `down_blocks.0.resnets.0.conv1.weight`.

    A leaf that is no layer's (`logit_scale`, `class_embedding`) keeps its own name.
    """
    return ".".join((*path[:-1], _LEAVES.get(path[-1], path[-1])))


def to_torch_layout(path: Path_, value: np.ndarray) -> np.ndarray:
    """A Flax leaf in the checkpoint's layout."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def to_flax_layout(path: Path_, value: np.ndarray) -> np.ndarray:
    """A checkpoint tensor in the Flax leaf's layout; the inverse of `to_torch_layout`."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """A whole tree as checkpoint names and contiguous arrays."""
    return {
        torch_key(path): np.asarray(to_torch_layout(path, np.asarray(leaf)), order="C")
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }


def to_torch_names(shapes: Mapping) -> list[str]:
    """The checkpoint's names of all leaves of a tree."""
    return [torch_key(path) for path in flax.traverse_util.flatten_dict(shapes)]


def match_tensors(
    tensors: Tensors, shapes: Mapping, source: str, *, leave_strays: bool = False
) -> dict[Path_, np.ndarray]:
    """Finds the tensor of every leaf of a tree; reads none of them.

    Names of older and newer libraries are known too: the autoencoder's former attention names, a
    text tower saved without its `text_model.` (transformers 5.6 and later), and a 1x1 convolution
    where a linear layer is expected, or the other way round, which is the same map.

    Args:
      tensors: by checkpoint name, as on disk.
      shapes: tree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`) to fill.
      source: what the tensors came from, for errors.
      leave_strays: tensors outside all modules of the tree, which no such network reads, are left
        out with a warning.

    Returns:
      A view for each leaf's path, of the leaf's shape and the file's dtype, in the file's order.

    Raises:
      ValueError: a tensor is missing, left over, misshaped or of integers; the first ten are
        named.
    """
    refuse_quantised(tensors, source)
    wanted = flax.traverse_util.flatten_dict(shapes)
    paths = {torch_key(path): path for path in wanted}
    views: dict[Path_, np.ndarray] = {}
    extra: list[str] = []
    strays: list[str] = []
    misshaped: list[str] = []
    modules = {key.partition(".")[0] for key in paths}
    for key in tensors:
        path = paths.get(_current(key, paths))
        if path is None or path in views:
            # Except buffers that older libraries stored; they hold no weights.
            if not key.endswith("position_ids"):
                stray = leave_strays and is_stray(key, modules)
                (strays if stray else extra).append(tensors.label(key))
            continue
        stored = tensors[key]
        view = to_flax_layout(path, _as_linear_or_conv(stored, len(wanted[path].shape)))
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            misshaped.append(f"{tensors.label(key)} is of {stored.dtype}, quantised weights?")
        elif view.shape != wanted[path].shape:
            expected = to_torch_layout(path, np.broadcast_to(0, wanted[path].shape)).shape
            misshaped.append(f"{tensors.label(key)} has shape {stored.shape}, expected {expected}")
        views[path] = view
    missing = [f"missing {tensors.label(key)}" for key, path in paths.items() if path not in views]
    unexpected = [f"unexpected {label}" for label in extra]
    raise_if([*missing, *unexpected, *misshaped], f"{source} does not fit its config")
    warn_strays(strays, source)
    return views


def is_stray(key: str, modules: Collection[str]) -> bool:
    """Whether a tensor is of none of a network's outermost modules, or left over from a LoRA."""
    return key.partition(".")[0] not in modules or "lora_" in key


def warn_strays(labels: Sequence[str], source: str) -> None:
    """Warns once of tensors that are left out."""
    if labels:
        named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if labels[5:] else "")
        logging.warning("%s: left out tensors that no network reads: %s", source, named)


def raise_if(problems: Sequence[str], what: str) -> None:
    """Raises a ValueError that names the first ten problems and counts the rest."""
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:10])}{more}")


def _current(key: str, known: Mapping[str, Path_]) -> str:
    """Today's name of a tensor that may have been stored under another."""
    *parents, module, leaf = ("", *key.split("."))
    renamed = ".".join((*parents[1:], _FORMER.get(module, module), leaf))
    return next((name for name in (key, renamed, f"text_model.{key}") if name in known), key)


def _as_linear_or_conv(value: np.ndarray, ndim: int) -> np.ndarray:
    """A linear layer's weight as a 1x1 convolution's, or the reverse, where `ndim` says so."""
    if value.ndim == 4 and ndim == 2 and value.shape[2:] == (1, 1):
        return value[:, :, 0, 0]
    if value.ndim == 2 and ndim == 4:
        return value[:, :, None, None]
    return value
