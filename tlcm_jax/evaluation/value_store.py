"""What scorers made of images, on disk beside them, so that it is not computed again.

One `.npz` a chunk of images, in `scores/` of their folder, named by the scorer and a hash of all
that its values depend on besides the images: its class and fields, weights included, and what is
known of the prompts. Its code is not among it: after a change of it remove `scores/`. Scorers
without weights, whose code is all they are, are asked again each time.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jaxtyping import Int

from tlcm_jax.evaluation.scorers.base import Annotations, Scorer
from tlcm_jax.io.files import atomic_write
from tlcm_jax.io.npz_files import read_npz


class ValueStore:
    """The values of one scorer for the images of one folder."""

    def __init__(self, images: Path, name: str, fingerprint: str, annotations: Annotations):
        """Names the folder, and does not make it.

        Args:
          images: where the images lie.
          name: of the scorer.
          fingerprint: see there.
          annotations: of all the prompts.
        """
        known = json.dumps({k: list(v) for k, v in annotations.items()}, sort_keys=True)
        digest = hashlib.blake2b(f"{fingerprint} {known}".encode(), digest_size=8).hexdigest()
        plain = "".join(c if c.isalnum() else "-" for c in name)
        self.folder = images / "scores" / f"{plain}-{digest}"

    def values(
        self, rows: Int[np.ndarray, " n"], compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The values of these images, read or computed and kept.

        Raises:
          OSError: they cannot be written.
        """
        path = self.folder / f"{rows[0]:06d}-{rows[-1]:06d}.npz"
        if path.is_file():
            try:
                found = read_npz(path)
                if all(len(each) == len(rows) for each in found.values()):
                    return found
                logging.warning("%s holds those of other images: scored again", path)
            except ValueError as error:
                logging.warning("%s: scored again", error)
        found = compute()
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        return found


def fingerprint(scorer: Scorer) -> str:
    """A hash of a scorer: its class, its fields, the bytes of its weights; "" if it has none."""
    if not jax.tree.leaves(getattr(scorer, "params", None)):
        return ""
    digest = hashlib.blake2b(digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, np.ndarray | jax.Array | np.generic):
            array = np.ascontiguousarray(value)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for each in value:
                feed(each)
        elif isinstance(value, nn.Module):
            digest.update(repr(value).encode())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            digest.update(type(value).__qualname__.encode())
            for field in dataclasses.fields(value):
                feed(getattr(value, field.name))
        elif isinstance(value, functools.partial):
            feed((value.func, value.args, value.keywords))
        elif callable(value):
            digest.update(f"{value.__module__}.{getattr(value, '__qualname__', '')}".encode())
            cells = getattr(value, "__closure__", None) or ()
            feed(tuple(cell.cell_contents for cell in cells))
        elif value is None or isinstance(value, str | bytes | int | float | bool):
            digest.update(repr(value).encode())
        else:  # a tokenizer or the like, which belongs to the weights
            digest.update(type(value).__qualname__.encode())

    feed(scorer)
    return digest.hexdigest()
