"""A form in which students are handed out: a row of a family's table of products."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcm_jax.io.image_size import ImageSize

Params = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a product is made of.

    Attributes:
      model: the teacher, a `LatentModel`, its weights in host memory.
      adapter: the LoRA, scaled; None where the backbone was trained whole and none was extracted.
      params: the backbone's weights with the adapter in; None for products of the adapter alone.
      dtype: of all weights that are written, one of `io.files.DTYPES`.
      metadata: text for the headers of files.
      size: of its images; None is the model's own.
    """

    model: Any
    adapter: Params | None
    params: Params | None
    dtype: str
    metadata: Mapping[str, str]
    size: ImageSize | None = None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A form in which students are handed out.

    Attributes:
      write: writes one into an empty folder.
      file: the name of the file that is the product; None if the folder is.
      has_weights: it holds the backbone's whole weights; otherwise the adapter alone.
      check: raises a ValueError or FileNotFoundError for the folder of a model's configs, if there
        can be no such product of it.
    """

    write: Callable[[Student, Path], None]
    file: str | None = None
    has_weights: bool = True
    check: Callable[[Path], Any] = lambda folder: None
