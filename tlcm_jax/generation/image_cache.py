"""Images that are made once: the teacher's, which every run on it is compared with."""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.files import atomic_write


def weights_hash(model: LatentModel) -> str:
    """A hash of all that a model's images depend on: weights, configs, precision."""
    digest = hashlib.blake2b(digest_size=16)
    description = [model.configs, np.dtype(model.dtype).name]
    digest.update(json.dumps(description, sort_keys=True, default=str).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(model.params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def cached(
    folder: Path | None, description: Sequence[Any], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """What `make` returns, from the folder if it was made by the same description before.

    Args:
      folder: where images are kept; None keeps none.
      description: plain values that say all the images depend on.
      make: generates them, an array of any shape.
    """
    if folder is None:
        return make()
    name = hashlib.blake2b(json.dumps(description).encode(), digest_size=16).hexdigest()
    path = Path(folder) / f"{name}.npz"
    # A damaged file is made again.
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        with np.load(path) as file:
            return file["images"]
    images = make()
    with atomic_write(path) as part:
        with part.open("wb") as file:
            np.savez_compressed(file, images=images)
    return images
