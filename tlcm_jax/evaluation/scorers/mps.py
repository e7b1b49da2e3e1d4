"""MPS, Multi-dimensional Preference Score, overall: the paper's reward (arXiv 2405.14705).

The network and its equations are in `models/mps.py`; the condition is the one of the overall score.
The paper's threshold s0 is 16.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from transformers import CLIPTokenizer

from tlcm_jax.data.tokens import clip_ids
from tlcm_jax.evaluation.scorers.base import Annotations, Scorer, image_scores
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.clip_files import read_clip_config
from tlcm_jax.io.json_files import naming
from tlcm_jax.io.places import Place, PlacedTensors
from tlcm_jax.io.scorer_files import Published, clip_tokenizer, open_weights, read_params
from tlcm_jax.io.tensors import Tensors
from tlcm_jax.models.clip import ARCHITECTURES
from tlcm_jax.models.mps import CrossConfig, MPSModel

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
_PUBLISHED = Published(files=("model", "mps"), origin="RE-N-Y/mpsv1 (imscore)")
# Constants that the file stores among the weights: biases of norms without bias, frequencies.
_CONSTANTS = re.compile(r"mps\.cross_model\..*(norm\.bias|inv_freq)")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MPSScorer(Scorer):
    """The overall score.

    Attributes:
      network: the network.
      tokenizer: reads the texts and the condition; it pads as its files say, which counts here.
      preprocess: of images.
    """

    network: MPSModel
    params: Any
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    name: str = "mps"
    threshold: float | None = 16.0
    differentiable: bool = True

    def texts(self, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
        """Token ids."""
        length = self.network.config.text.max_position_embeddings
        return clip_ids(self.tokenizer, prompts, length)

    def score(
        self, params: Any, images: Float[Array, "n h w 3"], texts: Int[Array, "n t"]
    ) -> Float[Array, " n"]:
        """Equation (3) of the network."""
        pixels = self.preprocess.pixels(images)
        condition = jnp.asarray(self.texts([CONDITION]))
        return self.network.apply({"params": params}, pixels, jnp.asarray(texts), condition)

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """Scores of images that Pillow has resized."""
        del annotations
        return {self.name: image_scores(self, self.preprocess.on_host(images), prompts)}


def load(path: str) -> MPSScorer:
    """Loads MPS.

    Args:
      path: folder or safetensors file of its weights, the tokenizer beside them.

    Raises:
      FileNotFoundError: weights or tokenizer are missing.
      ValueError: the weights are another network's.
    """
    tensors, folder = open_weights("mps", path, _PUBLISHED)
    config = read_clip_config(folder) or ARCHITECTURES["ViT-H-14"]
    network = MPSModel(config, _cross_config(path, tensors))
    side = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, config.text.max_position_embeddings), jnp.int32)
    weights = [key for key in tensors if not _CONSTANTS.fullmatch(key)]
    placed = PlacedTensors(tensors, {key.removeprefix("mps."): Place(key) for key in weights})
    return MPSScorer(
        network=network,
        params=read_params(placed, network, (pixels, ids, ids), path),
        tokenizer=clip_tokenizer(
            "mps", Path(folder), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", config.text.vocab_size
        ),
        preprocess=Preprocess(size=side),
    )


def _cross_config(path: str, tensors: Tensors) -> CrossConfig:
    """The cross model's sizes, from its weights."""
    stem = "mps.cross_model.layers."
    with naming(path):
        if not any(key.startswith(stem) for key in tensors):
            raise ValueError(f"it holds no MPS, whose layers are {stem}*")
        pairs, _ = tensors[f"{stem}0.0.fn.to_kv.weight"].shape
        queries, width = tensors[f"{stem}0.0.fn.to_q.weight"].shape
        inner = tensors[f"{stem}0.0.fn.ff.2.weight"].shape[1]
        return CrossConfig(
            layers=len({key[len(stem) :].split(".")[0] for key in tensors if key.startswith(stem)}),
            heads=queries // (pairs // 2),
            head_width=pairs // 2,
            expansion=inner // width,
        )
