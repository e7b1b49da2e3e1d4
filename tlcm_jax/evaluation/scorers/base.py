"""What a scorer is: one interface, whether preference follows it or an evaluation only tells it.

A scorer gives each image, beside its text, a number,

    s(image, text)  with its weights as an argument and every operation traceable,           (1)

and an evaluation one or more numbers to a set of images: what is kept of each (`values`), then what
they come to (`summarise`), so that images can be scored as they are made and need not be kept. A
class that derives from `Scorer` has all but (1) already: the mean of s over the images. A scorer of
whole sets, such as a Frechet distance, has `values` and `summarise` of its own and no (1).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree, UInt8

from tlcm_jax.data.batches import whole_batches

# What is known of each prompt besides its text: lists of n, as `data.prompt_sets.PromptSet` has.
Annotations = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that a scorer gives to a set of images.

    Attributes:
      key: under which it is reported.
      title: for people.
      percent: a share in 0..1 rather than a plain number.
      higher_is_better: False for distances.
    """

    key: str
    title: str
    percent: bool = False
    higher_is_better: bool = True


@runtime_checkable
class Scorer(Protocol):
    """Scores images by how well they show texts, or sets of them.

    Derive from it as a `dataclass(frozen=True, eq=False)`: scorers are told apart by identity.

    Attributes:
      name: under which its score is reported.
      differentiable: whether `score` has a gradient in the images that can be followed.
      threshold: s0, the score of an image that is good enough; None where none is known.
      params: its weights, on the host.
    """

    name: str
    differentiable: bool
    threshold: float | None
    params: PyTree

    def __hash__(self) -> int:
        return object.__hash__(self)

    def texts(self, prompts: Sequence[str]) -> PyTree[np.ndarray]:
        """Prompts as `score` reads them: token ids or the like, `[n, ...]` each."""
        del prompts
        raise NotImplementedError(f"scorer {self.name!r} reads no texts: it scores whole sets")

    def score(
        self, params: PyTree, images: Float[Array, "n h w 3"], texts: PyTree
    ) -> Float[Array, " n"]:
        """Equation (1), of images in 0..1 of any size; traceable."""
        del params, images, texts
        raise NotImplementedError(f"scorer {self.name!r} scores whole sets, not single images")

    @property
    def measures(self) -> Sequence[Measure]:
        """What `summarise` returns, in the order in which it is shown."""
        return (Measure(key=self.name, title=f"{self.name} score"),)

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """Raises a ValueError if images of n prompts cannot be scored, before any is made."""
        del prompts, annotations

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """What is kept of each image, by name, `[n, ...]`: scores, features."""
        del annotations
        return {self.name: image_scores(self, images, prompts)}

    def summarise(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """What the values of a set come to, by `Measure.key`: their means."""
        return {name: float(np.mean(each, dtype=np.float64)) for name, each in values.items()}

    def real_data_score(self, prompt_set: str, count: int) -> dict[str, float]:
        """What `count` real images of a set of prompts score; empty where that is unknown."""
        del prompt_set, count
        return {}


def image_scores(
    scorer: Scorer,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    batch_size: int = 50,
) -> Float[np.ndarray, " n"]:
    """Equation (1) of images with their own prompts."""
    texts, score = scorer.texts(prompts), _compiled(scorer)

    def read(rows: np.ndarray) -> tuple:
        chosen = jax.tree.map(lambda x: x[rows], texts)
        return images[rows].astype(np.float32) / 255, chosen

    return in_batches(score, scorer.params, read, len(images), min(batch_size, len(images)))


def in_batches(
    function: Callable[..., Array],
    params: PyTree,
    read: Callable[[np.ndarray], tuple],
    count: int,
    size: int,
) -> Float[np.ndarray, "n ..."]:
    """What a jitted function makes of n rows, in batches of one shape, cut over all local devices.

    At full precision, also on accelerators, whose products of fp32 matrices are bf16's by default.

    Args:
      function: `(params, *batch)` to an array, `[b, ...]`.
      params: its parameters, on the host; they are put onto every device once.
      read: rows of `0..n-1` to a batch, a tuple of trees of numpy arrays, `[b, ...]` each.
      count: n, at least 1.
      size: rows of a batch; rounded up to a multiple of the devices.
    """
    devices = np.array(jax.local_devices())
    mesh = Mesh(devices, ("data",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    cut = NamedSharding(mesh, PartitionSpec("data"))
    found = []
    with jax.default_matmul_precision("highest"):
        for rows in whole_batches(count, -(-size // len(devices)) * len(devices)):
            found.append(np.asarray(function(params, *jax.device_put(read(rows), cut)), np.float32))
    return np.concatenate(found)[:count]


@functools.lru_cache(maxsize=16)
def _compiled(scorer: Scorer) -> Callable:
    """Jitted once a scorer, not once a set of images."""
    return jax.jit(scorer.score)
