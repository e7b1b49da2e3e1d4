"""CLIP score: how well an image shows its text (Hessel et al., arXiv 2104.08718).

    s = 100 cos(u(image), v(prefix + text))                                                    (1)

The paper's number is OpenCLIP ViT-g/14 trained on LAION-2B (`laion2b_s12b_b42k`), without prefix;
`clip_prefixed` is the same with "A photo depicts ", which others put before a text. Scores of other
CLIPs are other numbers, so each has a name.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from transformers import CLIPTokenizer

from tlcm_jax.data.tokens import open_clip_ids
from tlcm_jax.evaluation.scorers.base import Annotations, Scorer, image_scores
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.clip_files import FILES, load_clip
from tlcm_jax.io.scorer_files import Published, clip_tokenizer
from tlcm_jax.models.clip import CLIPModel


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CLIPScorer(Scorer):
    """Equation (1), and what is made of the same two towers.

    Attributes:
      network: both towers.
      tokenizer: reads the texts.
      preprocess: of images.
      prefix: before every text.
      tokenize: `(tokenizer, texts, length)` to ids `[n, length]`.
      learned_scale: times the network's own exp(logit_scale) instead of 100.
    """

    name: str
    network: CLIPModel
    params: Any
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    prefix: str = ""
    tokenize: Callable[[CLIPTokenizer, Sequence[str], int], np.ndarray] = open_clip_ids
    learned_scale: bool = False
    threshold: float | None = None
    differentiable: bool = True

    def texts(self, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
        """Token ids."""
        length = self.network.config.text.max_position_embeddings
        return self.tokenize(self.tokenizer, [self.prefix + text for text in prompts], length)

    def score(
        self, params: Any, images: Float[Array, "n h w 3"], texts: Int[Array, "n t"]
    ) -> Float[Array, " n"]:
        """Equation (1)."""
        pixels = self.preprocess.pixels(images)
        image, text, scale = self.network.apply({"params": params}, pixels, jnp.asarray(texts))
        return (scale if self.learned_scale else 100.0) * jnp.sum(image * text, axis=-1)

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """Scores of images that Pillow has resized."""
        del annotations
        return {self.name: image_scores(self, self.preprocess.on_host(images), prompts)}


# Score -> the architecture it is defined by, a key of `models.clip.ARCHITECTURES`, and its weights.
PUBLISHED = {
    "clip": ("ViT-g-14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    "clip_prefixed": ("ViT-g-14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    "clip_h14": ("ViT-H-14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "clip_l14": ("ViT-L-14", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
    "clip_openai_l14": ("ViT-L-14-quickgelu", "openai/clip-vit-large-patch14"),
    "clip_openai_l14_336": ("ViT-L-14-336-quickgelu", "openai/clip-vit-large-patch14-336"),
    "clip_openai_b32": ("ViT-B-32-quickgelu", "openai/clip-vit-base-patch32"),
}


# What some papers put before every text.
_PREFIXES = {"clip_prefixed": "A photo depicts "}


def load(path: str, *, name: str = "clip") -> CLIPScorer:
    """Loads a CLIP score.

    Args:
      path: folder or safetensors file of its weights, the tokenizer beside them.
      name: a key of `PUBLISHED`.

    Raises:
      FileNotFoundError: weights or tokenizer are missing.
      ValueError: the weights are another network's.
    """
    architecture, origin = PUBLISHED[name]
    network, params, folder = load_clip(
        name, path, architecture, Published(files=FILES, origin=origin)
    )
    return CLIPScorer(
        name=name,
        network=network,
        params=params,
        tokenizer=clip_tokenizer(name, folder, origin, network.config.text.vocab_size),
        preprocess=Preprocess(size=network.config.vision.image_size),
        prefix=_PREFIXES.get(name, ""),
    )


LOADERS = {name: functools.partial(load, name=name) for name in PUBLISHED}
