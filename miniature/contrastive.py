"""A small scorer of pictures and texts, learnt contrastively (as CLIP: arXiv 2103.00020).

    s(image, text) = 100 cos(u(image), v(text))

u is a small convolutional network and v the mean of the text's word vectors, so that it needs
neither a tokenizer nor the teacher's text encoders, and shares nothing with the miniature's judge.
Trained by `miniature/train_scorer.py`. As a scorer's name: `miniature.contrastive`.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.io.json_files import parse, read_object
from tlcm_jax.io.scorer_files import read_own
from tlcm_jax.io.tensors import TensorFile

FOLDER = Path(__file__).with_name("scorer")
CONFIG, WEIGHTS = "scorer.json", "scorer.safetensors"
# Words of a text that are read, and rows of the table that words are hashed into; row 0 is none.
LENGTH, ROWS = 24, 8192


class ContrastiveNetwork(nn.Module):
    """Unit vectors of pictures and texts.

    Attributes:
      widths: channels of the image tower's stages, each at half the resolution of the one before.
      features: length of the vectors.
      resolution: pixels of the side that pictures are resized to.
      rows: of the table of words.
      context: words that a word is read with; 1 reads each by itself, in no order.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    features: int = 64
    resolution: int = 32
    rows: int = ROWS
    context: int = 1

    @nn.compact
    def __call__(self, images: Array, words: Array) -> tuple[Array, Array]:
        """Vectors `[n, features]` of pictures `[n, h, w, 3]` in 0..1 and of words `[n, LENGTH]`."""
        side = (self.resolution, self.resolution)
        x = images
        if x.shape[1:3] != side:
            x = jax.image.resize(x, (len(x), *side, 3), "bilinear", antialias=True)
        x = convolutions(2 * x - 1, self.widths)
        image = nn.Dense(self.features, name="image")(jnp.mean(x, axis=(1, 2)))

        table = nn.Embed(self.rows, self.features, name="words")(words)
        there = (words > 0)[..., None]
        if self.context > 1:
            read = nn.Conv(self.features, (self.context,), name="context")(there * table)
            table = table + nn.gelu(read)
        mean = jnp.sum(there * table, axis=-2) / jnp.maximum(jnp.sum(there, axis=-2), 1)
        text = mean + nn.Dense(self.features, name="text")(nn.gelu(mean))
        return _unit(image), _unit(text)


def convolutions(x: Array, widths: Sequence[int]) -> Array:
    """Stages of convolutions inside a module's `__call__`, each at half the resolution."""
    for i, width in enumerate(widths):
        x = nn.Conv(width, (3, 3), strides=2, name=f"down{i}")(x)
        x = nn.gelu(nn.GroupNorm(8, name=f"norm{i}")(x))
        x = x + nn.gelu(nn.Conv(width, (3, 3), name=f"conv{i}")(x))
    return x


@dataclasses.dataclass(frozen=True, eq=False)
class ContrastiveScorer(Scorer):
    """A trained scorer; see `Scorer`.

    Attributes:
      network: the module.
      params: its parameters, float32.
      threshold: mean score of real pictures with their own texts.
    """

    network: ContrastiveNetwork
    params: Mapping[str, Any]
    threshold: float

    name = "contrastive"
    differentiable = True

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: the folder lacks one of its two files.
          ValueError: a file is damaged, or the two do not belong together.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no scorer: {name} is missing; train one with "
                    "`python -m miniature.train_scorer`"
                )
        config = parse(folder / CONFIG, read_object(folder / CONFIG, "scorer"), _Sizes.from_dict)
        network = ContrastiveNetwork(
            config.widths, config.features, config.resolution, config.rows, config.context
        )
        inputs = _inputs(network)
        params = read_own(TensorFile([folder / WEIGHTS]), network, inputs, str(folder / WEIGHTS))
        return cls(network, params, config.threshold)

    def save(self, folder: str | Path) -> None:
        """Writes the weights (fp16) and the description."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: np.asarray(v, np.float16) for k, v in _flat(self.params).items()}
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS)
        config = {
            "widths": list(self.network.widths),
            "features": self.network.features,
            "resolution": self.network.resolution,
            "rows": self.network.rows,
            "context": self.network.context,
            "threshold": self.threshold,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Rows `[n, LENGTH]` int32 of the word table."""
        return words(prompts, self.network.rows)

    def score(self, params: Mapping[str, Any], images: Array, texts: Array) -> Array:
        """100 cos of pictures `[n, h, w, 3]`, 0 to 1, and texts, `[n]`."""
        image, text = self.network.apply({"params": params}, images, texts)
        return 100 * jnp.sum(image * text, axis=-1)


def load(path: str = "") -> ContrastiveScorer:
    """The scorer of a folder; without one the miniature's own."""
    return ContrastiveScorer.load(path or FOLDER)


def words(prompts: Sequence[str], rows: int = ROWS) -> np.ndarray:
    """Each text's first words as rows of the table, `[n, LENGTH]` int32; 0 where there is none."""
    table = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in zip(table, prompts, strict=True):
        found = re.findall(r"\w+", prompt.lower())[:LENGTH]
        # Hashed by content, and not by `hash`, which differs from process to process.
        row[: len(found)] = [1 + zlib.crc32(word.encode()) % (rows - 1) for word in found]
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What the description of a scorer says."""

    widths: tuple[int, ...]
    features: int
    resolution: int
    rows: int
    context: int
    threshold: float

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "_Sizes":
        if len(raw["widths"]) > 16 or raw["resolution"] > 16_384:
            raise ValueError("its widths or its resolution are no network's")
        rows, context = raw.get("rows", ROWS), raw.get("context", 1)
        if not (2 <= rows <= 2**20 and 1 <= context <= LENGTH):
            raise ValueError("its rows or its context are no network's")
        return cls(widths=tuple(raw["widths"]), features=raw["features"], rows=rows,
                   resolution=raw["resolution"], context=context,
                   threshold=raw["threshold"])  # fmt: skip


def _inputs(network: ContrastiveNetwork) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    side = network.resolution
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return images, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)


def initial_shapes(network: ContrastiveNetwork) -> Any:
    """The parameters' shapes."""
    return jax.eval_shape(network.init, jax.random.key(0), *_inputs(network))["params"]


def _flat(params: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _unit(x: Array) -> Array:
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
