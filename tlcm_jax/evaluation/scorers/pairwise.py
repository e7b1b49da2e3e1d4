"""How far apart pictures are, pair by pair: from a reference, and from each other.

With d a distance of two pictures, such as LPIPS (Zhang et al., arXiv 1801.03924),

    fidelity  = mean_i d(x_i, y_i),                      x_i and y_i from the same noise,       (1)
    diversity = mean_i mean_{j<k} d(x_ij, x_ik),         prompt i under the noises j and k.     (2)

A student that imitates its teacher has a small (1) to it; one that has lost the variety of its
teacher has a smaller (2) than the teacher's own.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tlcm_jax.data.batches import whole_batches

# Pictures in -1..1, `[b, h, w, 3]` twice to `[b]`; traceable.
Distance = Callable[[Array, Array], Array]


def distances(
    distance: Distance, first: np.ndarray, second: np.ndarray, batch: int = 50
) -> np.ndarray:
    """The distance of each pair, in batches of one compiled shape.

    Args:
      distance: of two batches of pictures.
      first: uint8 `[n, h, w, 3]`, n at least 1.
      second: the same.
      batch: pairs at a time.

    Returns:
      float32 `[n]`.

    Raises:
      ValueError: other shapes or values.
    """
    for pictures in (first, second):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or not len(pictures):
            raise ValueError(
                f"pictures must be uint8 [n, h, w, 3], not {pictures.dtype} {pictures.shape}"
            )
    if first.shape != second.shape:
        raise ValueError(f"pictures must pair up: {first.shape} and {second.shape} do not")
    compiled = jax.jit(distance)
    found = []
    for rows in whole_batches(len(first), batch):
        pair = [jnp.asarray(x[rows], jnp.float32) / 127.5 - 1 for x in (first, second)]
        found.append(np.asarray(compiled(*pair), np.float32))
    return np.concatenate(found)[: len(first)]


def diversity(distance: Distance, pictures: np.ndarray, batch: int = 50) -> float:
    """Equation (2).

    Args:
      distance: of two batches of pictures.
      pictures: uint8 `[draws, n, h, w, 3]`: n prompts, each under so many noises.
      batch: pairs at a time.

    Raises:
      ValueError: fewer than two draws.
    """
    if len(pictures) < 2:
        raise ValueError(f"diversity needs at least 2 draws of a prompt, not {len(pictures)}")
    pairs = list(itertools.combinations(range(len(pictures)), 2))
    first = np.concatenate([pictures[j] for j, _ in pairs])
    second = np.concatenate([pictures[k] for _, k in pairs])
    return float(distances(distance, first, second, batch).mean())
