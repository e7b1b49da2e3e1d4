"""Pictures with captions and maps, for the training of control networks.

A folder holds `metadata.jsonl`, a line for each picture as `datasets`' imagefolder has them:

    {"file_name": "a.png", "text": "a red cat", "conditioning_image_file_name": "maps/a.png"}

or `MODULE:FUNCTION` names a Python function of (batch size, seed) that yields `Examples` without
end, for pictures that are made or read elsewhere.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from tlcm_jax.data.prompts import PromptStream

METADATA = "metadata.jsonl"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MAP = "conditioning_image_file_name"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """A batch.

    Attributes:
      images: the pictures; None where their latents are known.
      maps: of edges or the like, of the pictures' size.
      texts: the captions.
      latents: of the pictures, as the model's autoencoder makes them, scaled.
    """

    images: UInt8[np.ndarray, "b h w 3"] | None = None
    maps: UInt8[np.ndarray, "b h w c"]
    texts: Sequence[str]
    latents: Float[np.ndarray, "b lh lw lc"] | None = None

    def check(self, source: str, size: tuple[int, int], channels: int) -> None:
        """Raises a ValueError unless pictures and maps are of (height, width) and the channels."""
        count = len(self.texts)
        if (self.images is None) == (self.latents is None):
            raise ValueError(f"{source}: give a batch's images, or else their latents")
        for what, array, depth in (("images", self.images, 3), ("maps", self.maps, channels)):
            wanted = (count, *size, depth)
            if array is None:
                continue
            if array.shape != wanted or array.dtype != np.uint8:
                raise ValueError(
                    f"{source}: {what} of {array.dtype} {array.shape} for {count} texts: give "
                    f"uint8 {wanted}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of `metadata.jsonl`; `map` is None where it names none."""

    image: Path
    text: str
    map: Path | None


def read_lines(folder: Path) -> list[Line]:
    """What a folder's `metadata.jsonl` lists.

    Raises:
      FileNotFoundError: there is none, or a file that it names is not there.
      ValueError: a line is not of the form above, or there are none.
    """
    file = folder / METADATA
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {METADATA}: write a line for each picture, "
            f'{{"file_name": ..., "text": ..., "{_MAP}": ...}}'
        )
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        try:
            said = json.loads(text)
        except ValueError:
            raise ValueError(f"{where} is not JSON") from None
        known = said if isinstance(said, dict) else {}
        texts = known.get("file_name"), known.get("text"), known.get(_MAP) or ""
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{where}: must be an object with texts file_name, text and, if any, {_MAP}"
            )
        image, map_ = folder / said["file_name"], folder / said[_MAP] if said.get(_MAP) else None
        for path in filter(None, (image, map_)):
            if not path.is_file():
                raise FileNotFoundError(f"{where}: there is no file {path}")
        found.append(Line(image=image, text=said["text"], map=map_))
    if not found:
        raise ValueError(f"{file} lists no pictures")
    return found


def folder_examples(
    folder: Path,
    size: int,
    seed: int,
    image_of: Callable[[Path], UInt8[np.ndarray, "h w 3"]],
    map_of: Callable[[Line], UInt8[np.ndarray, "h w c"]],
) -> Iterator[Examples]:
    """A folder's pictures in batches, in a new order each time, without end.

    Args:
      folder: with its `metadata.jsonl`.
      size: of a batch.
      seed: of the order.
      image_of: reads a picture, of the size that is trained on.
      map_of: reads or makes a line's map.
    """
    lines = read_lines(folder)
    stream, r = PromptStream([line.text for line in lines], size, seed=seed), 0
    while True:
        chosen = [lines[row] for row in stream.indices(r)]
        yield Examples(
            images=np.stack([image_of(line.image) for line in chosen]),
            maps=np.stack([map_of(line) for line in chosen]),
            texts=[line.text for line in chosen],
        )
        r += 1


def function_examples(path: str, size: int, seed: int) -> Iterator[Examples] | None:
    """What `MODULE:FUNCTION` yields; None of a path of another form.

    Raises:
      ValueError: there is no such module or function.
    """
    if not _FUNCTION.fullmatch(path):
        return None
    module, name = path.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--images {path}: {error}") from None
    return function(size, seed)
