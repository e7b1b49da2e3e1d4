"""Sets of images beside sets of real renders: `scorers=("miniature.shapes.features",)`.

Frechet distance (`evaluation/scorers/frechet.py`), precision and recall (`neighbours.py`) on the
features of a small network that `train_features.py` has taught, on fresh renders, to tell what is
in a picture and where. The reference has one fresh render of each image's own caption, of integers
that no training and no other scorer has, so that the prompts' distribution is the same on both
sides. The row of real renders, which are others again, says what is within reach at that number.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors.numpy import save_file

from miniature.contrastive import convolutions
from miniature.shapes.render import render
from miniature.shapes.scene import SIDE, TEST_START, Rung, draw_scene
from miniature.shapes.scorer import rung_named, score_of_reals, spec_of_caption
from tlcm_jax.evaluation.scorers import frechet
from tlcm_jax.evaluation.scorers.base import Annotations, Measure, Scorer, in_batches
from tlcm_jax.evaluation.scorers.frechet import Moments
from tlcm_jax.evaluation.scorers.neighbours import precision_recall
from tlcm_jax.io.scorer_files import read_own
from tlcm_jax.io.tensors import TensorFile

WEIGHTS = Path(__file__).with_name("features.safetensors")
# The reference's integers: apart from those of `scorer.reals`, which count from TEST_START.
_REFERENCE = TEST_START + 2**24
_LONGEST = 160  # bytes of a caption
_BATCH = 50


class FeatureNetwork(nn.Module):
    """What is in a picture: features, and from them the answers that it is taught by.

    Attributes:
      answers: number of the questions (`train_features.questions`).
      widths: channels of the stages, each at half the resolution of the one before.
      features: their number.
    """

    answers: int
    widths: tuple[int, ...] = (16, 32, 48, 64)
    features: int = 64

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "n answers"]]:
        """Features and logits of the answers of images in 0..1."""
        x = convolutions(2 * images - 1, self.widths)
        # Flat, not averaged: where a thing lies counts, too.
        features = nn.Dense(self.features, name="features")(x.reshape(len(x), -1))
        return features, nn.Dense(self.answers, name="answers")(nn.gelu(features))


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturesScorer(Scorer):
    """Frechet distance, precision and recall; see above.

    Attributes:
      rung: what the captions leave open is drawn from.
      network: of the features.
      params: its parameters, float32.
    """

    rung: Rung
    network: FeatureNetwork
    params: Mapping[str, Any]

    name = "features"
    differentiable = False
    threshold = None
    measures = (
        Measure(key="frechet", title="Frechet distance", higher_is_better=False),
        Measure(key="precision", title="precision", percent=True),
        Measure(key="recall", title="recall", percent=True),
        Measure(key="diversity", title="diversity over noise", percent=True),
    )

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`: captions of the world, and enough of them for a set."""
        del annotations
        for prompt in prompts:
            spec_of_caption(prompt)
            if len(prompt.encode()) > _LONGEST:
                raise ValueError(f"caption: {prompt[:40]!r}... is longer than {_LONGEST} bytes")
        if len(prompts) < 4:
            raise ValueError(f"score {self.name!r} compares sets: give at least 4 prompts")

    def values(
        self,
        images: UInt8[np.ndarray, "n 64 64 3"],
        prompts: Sequence[str],
        annotations: Annotations,
    ) -> dict[str, np.ndarray]:
        """See `Scorer`: the features, and the captions, for the reference, as bytes.

        Raises:
          ValueError: the images are not `[n, 64, 64, 3]`.
        """
        del annotations
        if images.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(
                f"miniature.shapes.features: images of {images.shape[1:]}; its network reads "
                f"those of {(SIDE, SIDE, 3)}"
            )
        captions = np.array([prompt.encode() for prompt in prompts], f"S{_LONGEST}")
        return {
            "features": self.features(images),
            "captions": captions.view(np.uint8).reshape(len(prompts), _LONGEST),
        }

    def features(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n d"]:
        """Of each image."""

        def read(rows: np.ndarray) -> tuple[np.ndarray]:
            return (images[rows].astype(np.float32) / 255,)

        size = min(_BATCH, len(images))
        return in_batches(_compiled(self.network), self.params, read, len(images), size)

    def summarise(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `Scorer`."""
        captions = np.ascontiguousarray(values["captions"]).view(f"S{_LONGEST}")[:, 0]
        real = _reference(self, tuple(caption.decode() for caption in captions.tolist()))
        apart, real_apart = (_apart(f, captions) for f in (values["features"], real))
        precision, recall = precision_recall(real, values["features"])
        distance = frechet.distance(Moments.of(values["features"]), Moments.of(real))
        return {
            "frechet": distance,
            "precision": precision,
            "recall": recall,
            "diversity": apart / real_apart if real_apart else np.nan,
        }

    def real_data_score(self, prompt_set: str, count: int) -> dict[str, float]:
        """See `Scorer`: of one fresh render of each caption."""
        return score_of_reals(self, self.rung, prompt_set, count)


def _apart(features: Float[np.ndarray, "n d"], captions: np.ndarray) -> float:
    """Sum of the distances of features of one caption; 0 where no caption comes twice."""
    total = 0.0
    for caption in np.unique(captions):
        own = features[captions == caption].astype(np.float64)
        total += float(np.linalg.norm(own[:, None] - own, axis=-1).sum()) / 2
    return total


@functools.lru_cache(maxsize=8)
def _reference(scorer: FeaturesScorer, captions: tuple[str, ...]) -> Float[np.ndarray, "n d"]:
    """Features of one fresh render of each caption; of the same captions always the same."""
    images = [
        render(draw_scene(spec_of_caption(caption), _REFERENCE + i, scorer.rung))
        for i, caption in enumerate(captions)
    ]
    return scorer.features(np.stack(images))


@functools.lru_cache(maxsize=4)
def _compiled(network: FeatureNetwork) -> Any:
    return jax.jit(lambda params, images: network.apply({"params": params}, images)[0])


def initial_shapes(network: FeatureNetwork) -> Any:
    """The parameters' shapes."""
    return jax.eval_shape(network.init, jax.random.key(0), *_inputs())["params"]


def _inputs() -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32),)


def save(params: Mapping[str, Any], path: Path) -> None:
    """Writes the weights in fp16."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    save_file({k: np.ascontiguousarray(np.asarray(v, np.float16)) for k, v in flat.items()}, path)


def load(path: str = "") -> FeaturesScorer:
    """For a rung, as `miniature.shapes.features=r2`; without one, for the first.

    Raises:
      FileNotFoundError: the weights are missing.
      ValueError: there is no such rung, or the weights are damaged.
    """
    rung = rung_named(path, "miniature.shapes.features")
    return read_features(WEIGHTS, rung)


def read_features(weights: Path, rung: Rung) -> FeaturesScorer:
    """As `load`, from a file of weights."""
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights} is missing; train it with `python -m miniature.shapes.train_features`"
        )
    tensors = TensorFile([weights])
    network = FeatureNetwork(answers=tensors["answers/bias"].shape[0])
    return FeaturesScorer(rung, network, read_own(tensors, network, _inputs(), str(weights)))
