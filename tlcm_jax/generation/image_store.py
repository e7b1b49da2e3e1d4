"""Images on disk, so that an evaluation that was stopped goes on where it was.

One PNG an image, named by its prompt's number, in a folder whose name ends in a hash of everything
that the images depend on: the weights, the sampler, the noise and the prompts. So a folder never
holds images of something else, and what differs lies beside it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Int, PyTree, UInt8
from PIL import Image

from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.files import atomic_write


class ImageStore:
    """The images of one sampler and one set of prompts."""

    def __init__(self, folder: Path, label: str, depends_on: Sequence[Any]):
        """Makes the folder.

        Args:
          folder: of all images.
          label: for people, such as "student, 4 steps".
          depends_on: plain values that say all the images depend on.
        """
        text = json.dumps(depends_on, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        name = "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in label).split())
        self.folder = folder / f"{name}-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"] | None:
        """The images of these prompts; None unless all are there and whole, which is told."""
        found = []
        for row in rows:
            path = self._path(int(row))
            try:
                with Image.open(path) as image:
                    found.append(np.asarray(image.convert("RGB")))
            except FileNotFoundError:
                return None
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                logging.warning("%s is damaged (%s): it is drawn again", path, error)
                return None
        if len({image.shape for image in found}) > 1:
            logging.warning("%s: images of several sizes: they are drawn again", self.folder)
            return None
        return np.stack(found)

    def write(self, rows: Int[np.ndarray, " n"], images: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Keeps the images of these prompts.

        Raises:
          OSError: they cannot be written.
        """
        for row, image in zip(rows, images, strict=True):
            with atomic_write(self._path(int(row))) as part:
                Image.fromarray(np.ascontiguousarray(image)).save(part, format="PNG")

    def _path(self, row: int) -> Path:
        return self.folder / f"{row:06d}.png"


def weights_hash(model: LatentModel, params: PyTree | None = None) -> str:
    """A hash of all that a model's images depend on: weights, configs, precision.

    Args:
      model: whose configs and precision.
      params: the weights, where they are not the model's own, such as an adapter beside them.
    """
    digest = hashlib.blake2b(digest_size=16)
    description = [model.configs, np.dtype(model.dtype).name]
    digest.update(json.dumps(description, sort_keys=True, default=str).encode())
    weights = dict(model.params) if params is None else params
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
