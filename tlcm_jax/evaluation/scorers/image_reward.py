"""ImageReward-v1.0: what people liked of a prompt's images (Xu et al., arXiv 2304.05977).

    s = (mlp(h_class) - 0.16717363) / 1.03333950,     h = BLIP's text tokens, having seen the image

Texts are cut at 35 tokens. The network is in `models/blip.py`.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from transformers import BertTokenizer

from tlcm_jax.data.tokens import read_bert_tokenizer
from tlcm_jax.evaluation.scorers.base import Annotations, Scorer, image_scores
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.json_files import naming
from tlcm_jax.io.places import Place, PlacedTensors
from tlcm_jax.io.scorer_files import Published, open_weights, read_params
from tlcm_jax.io.tensors import Tensors
from tlcm_jax.models.blip import BLIPConfig, ImageRewardModel

_MEAN, _STD, _LENGTH = 0.16717362830052426, 1.0333394966054072, 35
_PUBLISHED = Published(files=("ImageReward", "model"), origin="THUDM/ImageReward", convert=True)
# BLIP's projections into a common space, which the reward does not use, and constants.
_UNUSED = re.compile(r"blip\.(vision|text)_proj\..*|.*position_ids")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageRewardScorer(Scorer):
    """The normalised reward.

    Attributes:
      network: the network.
      tokenizer: BERT's, without case.
      preprocess: of images.
    """

    network: ImageRewardModel
    params: Any
    tokenizer: BertTokenizer
    preprocess: Preprocess
    name: str = "image_reward"
    threshold: float | None = None
    differentiable: bool = True

    def texts(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids and which of them are text, `[n, 35]`."""
        found = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_LENGTH
        )
        return {
            "ids": np.asarray(found["input_ids"], np.int32),
            "seen": np.asarray(found["attention_mask"], bool),
        }

    def score(
        self, params: Any, images: Float[Array, "n h w 3"], texts: dict[str, Array]
    ) -> Float[Array, " n"]:
        """The reward of images in 0..1."""
        pixels = self.preprocess.pixels(images)
        raw = self.network.apply({"params": params}, pixels, texts["ids"], texts["seen"])
        return (raw - _MEAN) / _STD

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """Rewards of images that Pillow has resized."""
        del annotations
        return {self.name: image_scores(self, self.preprocess.on_host(images), prompts)}


def load(path: str) -> ImageRewardScorer:
    """Loads ImageReward.

    Args:
      path: folder or safetensors file of its weights, BERT's `vocab.txt` beside them.

    Raises:
      FileNotFoundError: weights or vocabulary are missing.
      ValueError: the weights are another network's.
    """
    tensors, folder = open_weights("image_reward", path, _PUBLISHED)
    config = _config(path, tensors)
    network = ImageRewardModel(config)
    weights = {key: Place(key) for key in tensors if not _UNUSED.fullmatch(key)}
    inputs = (
        jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, _LENGTH), jnp.int32),
        jax.ShapeDtypeStruct((1, _LENGTH), bool),
    )
    return ImageRewardScorer(
        network=network,
        params=read_params(PlacedTensors(tensors, weights), network, inputs, path),
        tokenizer=_tokenizer(folder, config.vocab_size),
        preprocess=Preprocess(size=config.image_size),
    )


def _tokenizer(folder: Path, words: int) -> BertTokenizer:
    """BERT's tokenizer, of at most so many words."""
    for place in (folder, folder / "tokenizer"):
        if (file := place / "vocab.txt").is_file():
            return read_bert_tokenizer(file, words)
    raise FileNotFoundError(
        "the tokenizer of score 'image_reward' is missing: put vocab.txt of bert-base-uncased "
        f"into {folder / 'tokenizer'}"
    )


def _config(path: str, tensors: Tensors) -> BLIPConfig:
    """The sizes, from the weights."""

    def layers(stem: str) -> int:
        return len({key[len(stem) :].split(".")[0] for key in tensors if key.startswith(stem)})

    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    with naming(path):
        width, _, patch, _ = tensors[f"{vision}patch_embed.proj.weight"].shape
        count = tensors[f"{vision}pos_embed"].shape[1] - 1
        words, hidden = tensors[f"{text}embeddings.word_embeddings.weight"].shape
        positions = tensors[f"{text}embeddings.position_embeddings.weight"].shape[0]
        inner = tensors[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0]
    return BLIPConfig(
        image_size=round(count**0.5) * patch,
        patch_size=patch,
        vision_width=width,
        vision_layers=layers(f"{vision}blocks."),
        vocab_size=words,
        positions=positions,
        text_width=hidden,
        text_inner=inner,
        text_layers=layers(f"{text}encoder.layer."),
    )
