"""The judge of the miniature world: which pictures show what was asked for, and how real they look.

A picture's Frechet features are P (h - mean h), h the network's 1 280 features (`judge_network`):
64 principal components of the real training pictures, few enough for the covariance of some
hundred generated ones (`frechet`).

No loss uses the judge: the autoencoder's perceptual loss is on VGG16, and distillation sees no
picture at all. A score means something only beside the same judge's score on real pictures, which
`judge.json` holds (`Judge.real`) and `Judge.report` returns with its own. As a scorer's name:
`miniature.judge`.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from miniature.judge_network import JudgeNetwork
from tlcm_jax.data.batches import whole_batches
from tlcm_jax.evaluation.scorers import frechet
from tlcm_jax.evaluation.scorers.base import Annotations, Measure, Scorer
from tlcm_jax.evaluation.scorers.frechet import Moments
from tlcm_jax.io.json_files import naming, read_object
from tlcm_jax.io.placement import check_finite
from tlcm_jax.io.tensors import TensorFile

FOLDER = pathlib.Path(__file__).with_name("judge")
WEIGHTS, DESCRIPTION = "judge.safetensors", "judge.json"
_FORMAT = 1
_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """A trained judge.

    Attributes:
      network: the module.
      params: its parameters, float32.
      labels: English object labels, in the order of the object logits.
      styles: style names, in the order of the style logits.
      resolution: pixels of the pictures it was trained on; others are resized to it first.
      centre: `[1280]` mean features of the real training pictures.
      projection: `[1280, d]` their principal components.
      moments: split name -> moments of the real pictures' projected features.
      floors: split name -> (n, floor) pairs: `frechet.floor` of n real pictures.
      real: real pictures' own scores, by split: `object_top1`, `object_top5`, `style`, `count`.
    """

    network: JudgeNetwork
    params: Mapping[str, Any]
    labels: tuple[str, ...]
    styles: tuple[str, ...]
    resolution: int
    centre: np.ndarray
    projection: np.ndarray
    moments: Mapping[str, Moments]
    floors: Mapping[str, tuple[tuple[int, float], ...]]
    real: Mapping[str, Mapping[str, float]]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Judge":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: the folder lacks one of its two files.
          ValueError: a file is damaged, of another version, or the two do not belong together.
        """
        return _load(pathlib.Path(folder))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the weights (matrices and kernels in fp16, the rest in fp32) and the tables."""
        _save(self, pathlib.Path(folder))

    def judge(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the network says of pictures, in batches of one compiled shape.

        Args:
          images: `[n, h, w, 3]` floats, 0 to 1.

        Returns:
          Frechet features `[n, d]` float64, object logits `[n, classes]` and style logits
          `[n, styles]` float32.

        Raises:
          ValueError: pictures of another shape or range.
        """
        images = _checked(images)
        apply = _compiled(self.network, self.resolution)
        outputs: list[tuple[np.ndarray, ...]] = []
        for rows in whole_batches(len(images), _BATCH):
            result = apply(self.params, images[rows])
            parts = (result.features, result.objects, result.styles)
            outputs.append(tuple(np.asarray(part) for part in parts))
        features, objects, styles = (
            np.concatenate(parts)[: len(images)] for parts in zip(*outputs, strict=True)
        )
        return (features.astype(np.float64) - self.centre) @ self.projection, objects, styles

    def features(self, images: np.ndarray) -> np.ndarray:
        """Frechet features `[n, d]` of pictures `[n, h, w, 3]`, 0 to 1."""
        return self.judge(images)[0]

    def score(
        self, images: np.ndarray, labels: Sequence[str], styles: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Whether each picture shows what was asked for.

        Args:
          images: `[n, h, w, 3]` floats, 0 to 1.
          labels: n object labels, as in `self.labels`.
          styles: n style names, as in `self.styles`.

        Returns:
          `object_top1`, `object_top5`, `style`: `[n]` bool; `object_rank`: `[n]` int, 0 if the
          right object scores highest.

        Raises:
          ValueError: an unknown label or style, or not one of each per picture.
        """
        _, objects, style_logits = self.judge(images)
        return self.compare(objects, style_logits, labels, styles)

    def report(
        self,
        images: np.ndarray,
        labels: Sequence[str],
        styles: Sequence[str],
        split: str = "train",
    ) -> dict[str, Any]:
        """Scores of a set of pictures beside those of real ones, in one pass.

        Args:
          images: `[n, h, w, 3]` floats, 0 to 1.
          labels: n object labels.
          styles: n style names.
          split: the real pictures to compare with, a key of `self.moments`.

        Returns:
          `count`; `object_top1`, `object_top5`, `style` as shares; `frechet` to the split's real
          pictures; `frechet_floor`, what as many real ones score; `real`, the split's own shares.

        Raises:
          ValueError: as `score`; an unknown split; fewer than two pictures.
        """
        if split not in self.moments:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(self.moments)}")
        features, objects, style_logits = self.judge(images)
        verdicts = self.compare(objects, style_logits, labels, styles)
        shares = {k: float(verdicts[k].mean()) for k in ("object_top1", "object_top5", "style")}
        return {
            "count": len(images),
            **shares,
            "frechet": frechet.distance(Moments.of(features), self.moments[split]),
            "frechet_floor": self.floor(len(images), split),
            "real": dict(self.real[split]),
        }

    def floor(self, count: int, split: str = "train") -> float:
        """Frechet distance that `count` real pictures of a split have to its other ones.

        Interpolated linearly in 1/n, as which the bias falls. Beyond the largest measured n
        (half of the split) the largest one's value is returned.
        """
        sizes, values = zip(*sorted(self.floors[split]), strict=True)
        inverse = [1 / n for n in reversed(sizes)]
        return float(np.interp(1 / max(count, 1), inverse, list(reversed(values))))

    def compare(
        self,
        objects: np.ndarray,
        style_logits: np.ndarray,
        labels: Sequence[str],
        styles: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """Verdicts, as of `score`, from the logits that `judge` gives."""
        wanted = _indices(labels, self.labels, "object label", len(objects))
        wanted_style = _indices(styles, self.styles, "style", len(objects))
        right = objects[np.arange(len(objects)), wanted][:, None]
        rank = (objects > right).sum(1)
        return {
            "object_top1": rank < 1,
            "object_top5": rank < 5,
            "object_rank": rank,
            "style": style_logits.argmax(1) == wanted_style,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeScorer(Scorer):
    """The judge as evaluations ask it: objects and styles by the prompts' `label` and `style`.

    The Frechet distance is to all real pictures that the teacher was trained on, whatever the
    prompts: the larger sample is the less noisy one.

    Attributes:
      judge: the network with the statistics of real pictures.
    """

    judge: Judge

    name = "judge"
    differentiable = False
    threshold = None
    params = None
    measures = (
        Measure(key="object_top1", title="object top-1", percent=True),
        Measure(key="object_top5", title="object top-5", percent=True),
        Measure(key="style_accuracy", title="style", percent=True),
        Measure(key="frechet_distance", title="Fréchet", higher_is_better=False),
    )

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """See `Scorer`."""
        for key, known in (("label", self.judge.labels), ("style", self.judge.styles)):
            if key not in annotations:
                raise ValueError(
                    f"the judge needs each prompt's {key!r}: put a JSON file of the same name "
                    "beside the prompt file, or leave out the scorer miniature.judge"
                )
            for value in annotations[key]:
                if value not in known:
                    raise ValueError(f"the judge knows no {key} {value!r}: leave that prompt out")
        if len(prompts) < 2:
            raise ValueError("the judge's Frechet distance needs at least 2 prompts")

    def values(
        self, images: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """See `Scorer`: verdicts `[n]`, and Frechet features `[n, d]`."""
        features, objects, styles = self.judge.judge(images.astype(np.float32) / 255)
        verdicts = self.judge.compare(objects, styles, annotations["label"], annotations["style"])
        return {
            "object_top1": verdicts["object_top1"],
            "object_top5": verdicts["object_top5"],
            "style_accuracy": verdicts["style"],
            "features": features,
        }

    def summarise(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `Scorer`."""
        shares = {key: values[key] for key in ("object_top1", "object_top5", "style_accuracy")}
        distance = frechet.distance(Moments.of(values["features"]), self.judge.moments["train"])
        return {**super().summarise(shares), "frechet_distance": distance}

    def real_data_score(self, prompt_set: str, count: int) -> dict[str, float]:
        """See `Scorer`; the distance is what as many real pictures have to the others."""
        real = self.judge.real.get(prompt_set)
        if real is None:
            return {}
        return {
            "object_top1": real["object_top1"],
            "object_top5": real["object_top5"],
            "style_accuracy": real["style"],
            "frechet_distance": self.judge.floor(count),
        }


def load(path: str = "") -> JudgeScorer:
    """The judge of a folder as a scorer; without one the miniature's own."""
    return JudgeScorer(Judge.load(path or FOLDER))


@functools.lru_cache(maxsize=4)
def _compiled(network: JudgeNetwork, resolution: int) -> Any:
    """The jitted network, one per architecture, so that judges share compilations."""

    def apply(params: Mapping[str, Any], images: Array) -> Any:
        if images.shape[1:3] != (resolution, resolution):
            images = jax.image.resize(
                images, (len(images), resolution, resolution, 3), "bilinear", antialias=True
            )
        return network.apply({"params": params}, images)

    return jax.jit(apply)


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"pictures must be [n, h, w, 3] with n at least 1, not {images.shape}")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"pictures must be floats from 0 to 1, not {images.dtype}: divide by 255")
    images = images.astype(np.float32)
    if not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):  # NaN fails this, too
        raise ValueError(
            f"pictures must lie in 0 to 1, not {images.min():.3g} to {images.max():.3g}: "
            "clip or rescale them"
        )
    return images


def _indices(wanted: Sequence[str], known: Sequence[str], kind: str, count: int) -> np.ndarray:
    if len(wanted) != count:
        raise ValueError(f"{count} pictures need {count} {kind}s, not {len(wanted)}")
    row = {name: i for i, name in enumerate(known)}
    for name in wanted:
        if name not in row:
            raise ValueError(f"the judge knows no {kind} {name!r}: see {DESCRIPTION}")
    return np.array([row[name] for name in wanted])


def _save(judge: Judge, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "/".join(("network", *path)): np.asarray(x, np.float16 if np.ndim(x) > 1 else np.float32)
        for path, x in flax.traverse_util.flatten_dict(dict(judge.params)).items()
    }
    arrays["frechet/centre"] = judge.centre.astype(np.float32)
    arrays["frechet/projection"] = judge.projection.astype(np.float32)
    for split, moments in judge.moments.items():
        arrays[f"frechet/{split}/mean"] = moments.mean.astype(np.float32)
        arrays[f"frechet/{split}/covariance"] = moments.covariance.astype(np.float32)
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, folder / WEIGHTS)
    description = {
        "format": _FORMAT,
        "side": judge.network.side,
        "width": judge.network.width,
        "sharpness": judge.network.sharpness,
        "resolution": judge.resolution,
        "counts": {split: moments.count for split, moments in judge.moments.items()},
        "floors": {split: [list(pair) for pair in pairs] for split, pairs in judge.floors.items()},
        "real": {split: dict(scores) for split, scores in judge.real.items()},
        "styles": list(judge.styles),
        "labels": list(judge.labels),
    }
    text = json.dumps(description, indent=1, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _load(folder: pathlib.Path) -> Judge:
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no judge: {name} is missing; "
                "train one with `python -m miniature.train_judge`"
            )
    try:
        described = read_object(folder / DESCRIPTION, "judge")
        arrays = TensorFile([folder / WEIGHTS])
        for name in arrays:
            check_finite(name, arrays[name])
    except ValueError as error:
        raise ValueError(f"{folder}: a file of the judge is damaged ({error})") from None
    if described.get("format") != _FORMAT:
        raise ValueError(f"{folder / DESCRIPTION} is not a judge of format {_FORMAT}")
    with naming(folder / DESCRIPTION):
        return _described(described, arrays)


def _described(described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Judge:
    """The judge that a description and its arrays make."""
    for key in ("side", "width", "resolution"):
        if not isinstance(described[key], int) or not 0 < described[key] <= 16_384:
            raise ValueError(f"{key} = {described[key]!r}: must be a whole number of pixels")
    network = JudgeNetwork(
        classes=len(described["labels"]),
        styles=len(described["styles"]),
        side=described["side"],
        width=described["width"],
        sharpness=described["sharpness"],
    )
    try:
        params = _params(network, arrays)
        moments = {
            split: Moments(
                count,
                arrays[f"frechet/{split}/mean"].astype(np.float64),
                arrays[f"frechet/{split}/covariance"].astype(np.float64) * (count - 1),
            )
            for split, count in described["counts"].items()
        }
        centre, projection = arrays["frechet/centre"], arrays["frechet/projection"]
    except KeyError as error:
        raise ValueError(f"{WEIGHTS} lacks {error}: it is not this judge's") from None
    return Judge(
        network=network,
        params=params,
        labels=tuple(described["labels"]),
        styles=tuple(described["styles"]),
        resolution=described["resolution"],
        centre=centre.astype(np.float64),
        projection=projection.astype(np.float64),
        moments=moments,
        floors={k: tuple((int(n), float(v)) for n, v in p) for k, p in described["floors"].items()},
        real=described["real"],
    )


def _params(network: JudgeNetwork, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The network's float32 parameters; KeyError names a missing array, ValueError a wrong one."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    flat = {}
    for path, expected in flax.traverse_util.flatten_dict(shapes).items():
        name = "/".join(("network", *path))
        if arrays[name].shape != expected.shape:
            raise ValueError(
                f"the judge's {name} has shape {arrays[name].shape}, not {expected.shape}: "
                f"{WEIGHTS} and {DESCRIPTION} do not belong together"
            )
        flat[path] = arrays[name].astype(np.float32)
    return flax.traverse_util.unflatten_dict(flat)
