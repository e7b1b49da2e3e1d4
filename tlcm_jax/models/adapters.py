"""Adapters made from other adapters, and from fully fine-tuned weights.

Low-rank updates add up by joining their factors along the rank:

    w1 B1 A1 + w2 B2 A2 = [w1 B1, w2 B2] [A1; A2],                              (1)

and the best rank-r update towards weights W' = W + D keeps the r largest singular values of D
(Eckart and Young 1936):

    D = U S V^T,   B = U_r sqrt(S_r),   A = sqrt(S_r) V_r^T.                    (2)
"""

from collections.abc import Mapping, Sequence

import flax.traverse_util
import numpy as np

from tlcm_jax.models.lora import TARGETS, Tree, targeted


def is_adapter(tree: Tree) -> bool:
    """Whether a tree holds LoRA factors, as against whole weights."""
    return any(path[-1] == "lora_A" for path in flax.traverse_util.flatten_dict(tree))


def concat_loras(adapters: Sequence[Tree], weights: Sequence[float]) -> Mapping:
    """Several adapters as one, equation (1).

    Args:
      adapters: trees of factors, already scaled; they need not adapt the same layers.
      weights: how strongly each is applied.

    Returns:
      One adapter. Where a layer is adapted by several, its rank is the sum of theirs. A single
      adapter of weight 1 is returned as it is.

    Raises:
      ValueError: there is no adapter, or not one weight for each.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if len(adapters) == 1 and weights[0] == 1:
        return adapters[0]
    joined: dict[tuple[str, ...], list] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, leaf in flax.traverse_util.flatten_dict(adapter).items():
            scale = np.float32(weight if path[-1] == "lora_B" else 1)
            joined.setdefault(path, []).append(np.asarray(leaf) * scale)
    return flax.traverse_util.unflatten_dict(
        {
            path: np.concatenate(leaves, axis=-1 if path[-1] == "lora_A" else -2)
            for path, leaves in joined.items()
        }
    )


def svd_extract(
    base: Tree, tuned: Tree, rank: int, targets: Sequence[str] = TARGETS
) -> tuple[dict, float]:
    """The adapter nearest to fully fine-tuned weights, equation (2).

    Args:
      base: the teacher's weights.
      tuned: the student's, of the same shapes.
      rank: r. A layer whose smaller side is below it gets zeros for the rest, because readers
        disagree on the scale of files whose layers differ in rank.
      targets: endings of the names of the layers to adapt.

    Returns:
      The adapter, already scaled, float32; and the part of the change that it misses: the norm of
      (tuned - base - its update) over the norm of (tuned - base), over all weights, those of
      layers that are not adapted included.

    Raises:
      ValueError: the rank is not positive, the trees differ, or the weights do not.
    """
    if rank < 1:
        raise ValueError(f"lora rank must be at least 1, got {rank}")
    before, after = (flax.traverse_util.flatten_dict(tree) for tree in (base, tuned))
    if before.keys() != after.keys():
        raise ValueError("the fine-tuned weights are not those of this model: their names differ")
    adapter: dict[tuple[str, ...], np.ndarray] = {}
    missed = changed = 0.0
    for path, kernel in before.items():
        change = np.asarray(after[path], np.float32) - np.asarray(kernel, np.float32)
        squared = float(np.sum(np.square(change, dtype=np.float64)))
        changed += squared
        if path[-1] != "kernel" or not targeted(path[:-1], targets):
            missed += squared
            continue
        u, s, vt = np.linalg.svd(change.reshape(-1, change.shape[-1]), full_matrices=False)
        missed += float(np.sum(np.square(s[rank:], dtype=np.float64)))
        root = np.sqrt(s[:rank])
        pad = (0, rank - len(root))
        down = np.pad(u[:, :rank] * root, ((0, 0), pad))
        up = np.pad(root[:, None] * vt[:rank], (pad, (0, 0)))
        ones = (1,) * (change.ndim - 2)
        adapter[(*path[:-1], "lora_A")] = down.reshape(*change.shape[:-1], rank)
        adapter[(*path[:-1], "lora_B")] = up.reshape(*ones, rank, change.shape[-1])
    if not changed:
        raise ValueError("the fine-tuned weights equal the teacher's: there is nothing to extract")
    return flax.traverse_util.unflatten_dict(adapter), (missed / changed) ** 0.5
