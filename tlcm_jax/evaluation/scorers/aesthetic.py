"""LAION's aesthetic scores: how an image would be rated, 1 to 10, whatever its text.

    s = head(u(image)),     u the unit vector of OpenAI's CLIP ViT-L/14                        (1)

with the heads of `models/aesthetic.py`. v2 is what papers report; the same model scores 5.58 in
one table and 5.87 in another, so compare only what one tool has scored.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tlcm_jax.evaluation.scorers.base import Annotations, Scorer, image_scores
from tlcm_jax.evaluation.scorers.clip import PUBLISHED as CLIPS
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.clip_files import FILES, load_clip
from tlcm_jax.io.scorer_files import Published, open_weights, read_params
from tlcm_jax.models.aesthetic import AestheticV1, LinearChain
from tlcm_jax.models.clip import CLIPModel, unit

_HEADS: dict[str, tuple[nn.Module, Published]] = {
    "aesthetic": (
        LinearChain(),
        Published(
            files=("sac+logos+ava1-l14-linearMSE",),
            origin="github.com/christophschuhmann/improved-aesthetic-predictor",
            convert=True,
        ),
    ),
    "aesthetic_v1": (
        AestheticV1(),
        Published(
            files=("sa_0_4_vit_l_14_linear",),
            origin="github.com/LAION-AI/aesthetic-predictor",
            convert=True,
        ),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AestheticScorer(Scorer):
    """Equation (1).

    Attributes:
      network: CLIP's towers, of which the text's is not used.
      head: from unit vectors to scores.
      params: of both, `clip` and `head`.
      preprocess: of images.
    """

    name: str
    network: CLIPModel
    head: nn.Module
    params: Any
    preprocess: Preprocess
    threshold: float | None = None
    differentiable: bool = True

    def texts(self, prompts: Sequence[str]) -> Float[np.ndarray, "n 0"]:
        """Nothing: the texts do not matter."""
        return np.zeros((len(prompts), 0), np.float32)

    def score(self, params: Any, images: Float[Array, "n h w 3"], texts: Any) -> Float[Array, " n"]:
        """Equation (1)."""
        del texts
        pixels = self.preprocess.pixels(images)
        u = self.network.apply({"params": params["clip"]}, pixels, method="encode_image")
        return self.head.apply({"params": params["head"]}, unit(u))

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """Scores of images that Pillow has resized."""
        del annotations
        return {self.name: image_scores(self, self.preprocess.on_host(images), prompts)}


def load(path: str, *, name: str = "aesthetic") -> AestheticScorer:
    """Loads an aesthetic score.

    Args:
      path: a folder with the head's weights and with those of CLIP, there or in its `clip`.
      name: a key of the heads, `aesthetic` (v2) or `aesthetic_v1`.

    Raises:
      FileNotFoundError: either's weights are missing.
      ValueError: the weights are another network's.
    """
    head, published = _HEADS[name]
    tensors, folder = open_weights(name, path, published)
    architecture, origin = CLIPS["clip_openai_l14"]
    tower = Path(folder) / "clip"
    network, params, _ = load_clip(
        name,
        tower if tower.is_dir() else folder,
        architecture,
        Published(files=FILES, origin=origin),
    )
    vector = jax.ShapeDtypeStruct((1, network.config.projection_dim), jnp.float32)
    return AestheticScorer(
        name=name,
        network=network,
        head=head,
        params={"clip": params, "head": read_params(tensors, head, (vector,), str(path))},
        preprocess=Preprocess(size=network.config.vision.image_size),
    )


LOADERS = {name: functools.partial(load, name=name) for name in _HEADS}
