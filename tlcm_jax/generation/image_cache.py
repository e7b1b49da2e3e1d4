"""Pictures that are drawn once: the teacher's, which every run on it is compared with."""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.io.files import atomic_write


def weights_hash(pipeline: StableDiffusion) -> str:
    """A hash of all that a pipeline's pictures depend on: weights, configs, precision."""
    digest = hashlib.blake2b(digest_size=16)
    description = [pipeline.configs, np.dtype(pipeline.unet.dtype).name]
    digest.update(json.dumps(description, sort_keys=True, default=str).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(pipeline.params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def cached(
    folder: Path | None, description: Sequence[Any], draw: Callable[[], np.ndarray]
) -> np.ndarray:
    """What `draw` returns, from the folder if it was drawn by the same description before.

    Args:
      folder: where pictures are kept; None keeps none.
      description: plain values that say all the pictures depend on.
      draw: draws them, an array of any shape.
    """
    if folder is None:
        return draw()
    name = hashlib.blake2b(json.dumps(description).encode(), digest_size=16).hexdigest()
    path = Path(folder) / f"{name}.npz"
    # A damaged file is drawn again.
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        with np.load(path) as file:
            return file["pictures"]
    pictures = draw()
    with atomic_write(path) as part:
        with part.open("wb") as file:
            np.savez_compressed(file, pictures=pictures)
    return pictures
