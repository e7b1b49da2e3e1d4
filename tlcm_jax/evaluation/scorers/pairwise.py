"""How far apart images are, pair by pair: from a reference, and from each other.

With d a distance of two images, such as LPIPS (Zhang et al., arXiv 1801.03924),

    fidelity  = mean_i d(x_i, y_i),                      x_i and y_i from the same noise,       (1)
    diversity = mean_i mean_{j<k} d(x_ij, x_ik),         prompt i under the noises j and k.     (2)

A student that imitates its teacher has a small (1) to it; one that has lost the variety of its
teacher has a smaller (2) than the teacher's own.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tlcm_jax.data.batches import whole_batches
from tlcm_jax.io.lpips_files import load_lpips

# Images in -1..1, `[b, h, w, 3]` twice to `[b]`; traceable.
Distance = Callable[[Array, Array], Array]


def lpips_distance(folder: str | Path, trunk: str = "alex") -> Distance:
    """LPIPS 0.1, from the folder of its two files (`io.lpips_files.load_lpips`)."""
    network, params = load_lpips(folder, trunk)
    return functools.partial(network.apply, {"params": jax.device_put(params)})


def distances(
    distance: Distance,
    first: UInt8[np.ndarray, "n h w 3"],
    second: UInt8[np.ndarray, "n h w 3"],
    batch: int = 50,
) -> Float[np.ndarray, " n"]:
    """The distance of each pair, in batches of one compiled shape.

    Args:
      distance: of two batches of images.
      first: n images, at least 1.
      second: as many.
      batch: pairs at a time.

    Raises:
      ValueError: other shapes or values.
    """
    for images in (first, second):
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"images must be uint8 [n, h, w, 3], not {images.dtype} {images.shape}"
            )
    if first.shape != second.shape:
        raise ValueError(f"images must pair up: {first.shape} and {second.shape} do not")
    compiled = jax.jit(distance)
    found = []
    for rows in whole_batches(len(first), batch):
        pair = [jnp.asarray(x[rows], jnp.float32) / 127.5 - 1 for x in (first, second)]
        found.append(np.asarray(compiled(*pair), np.float32))
    return np.concatenate(found)[: len(first)]


def diversity(
    distance: Distance, images: UInt8[np.ndarray, "draws n h w 3"], batch: int = 50
) -> float:
    """Equation (2).

    Args:
      distance: of two batches of images.
      images: of n prompts, each under so many noises.
      batch: pairs at a time.

    Raises:
      ValueError: fewer than two draws.
    """
    if len(images) < 2:
        raise ValueError(f"diversity needs at least 2 draws of a prompt, not {len(images)}")
    pairs = list(itertools.combinations(range(len(images)), 2))
    first = np.concatenate([images[j] for j, _ in pairs])
    second = np.concatenate([images[k] for _, k in pairs])
    return float(distances(distance, first, second, batch).mean())
