"""Frechet distances of features: the FID and its kin, against a set of real images.

| score | features | an image becomes |
|---|---|---|
| `fid` | Inception of 2015-12-05 | 299 x 299, Pillow's bicubic in float, as clean-fid |
| `fid_512` | the same | 512 x 512, Pillow's Lanczos, then as for `fid`: DMD2's |
| `patch_fid` | the same | its middle 299 x 299 |
| `fd_dinov2` | DINOv2 ViT-L/14, class token | 224 x 224, Pillow's bicubic |
| `fd_clip` | CLIP ViT-L/14, class token after its norm | 224 x 224, Pillow's bicubic |

The distance is `frechet.py`'s. The real images lie in the folder of the weights: `real/`, any image
files; `real.txt`, one line that names a set, such as `tfds:coco_captions/2017@val`; or `real.npz`
with `mu` and `sigma`, the form in which clean-fid and others store statistics (of the same
features!). Statistics of the first two are kept in `real-NAME.npz` for the next time.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, UInt8
from PIL import Image

from tlcm_jax.data.tfds_sets import read_images
from tlcm_jax.evaluation.scorers import frechet
from tlcm_jax.evaluation.scorers.base import Annotations, Measure, Scorer, in_batches
from tlcm_jax.evaluation.scorers.frechet import Moments
from tlcm_jax.evaluation.scorers.preprocess import Preprocess
from tlcm_jax.io.clip_files import FILES, load_clip
from tlcm_jax.io.files import atomic_write
from tlcm_jax.io.npz_files import read_npz
from tlcm_jax.io.places import Place, PlacedTensors
from tlcm_jax.io.scorer_files import Published, open_weights, read_params
from tlcm_jax.models.dinov2 import DINOv2, DINOv2Config
from tlcm_jax.models.inception import FIDInception

_SIDE = 299
_INCEPTION = Published(
    files=("pt_inception-2015-12-05-6726825d", "model"),
    origin="the releases of github.com/mseitzer/pytorch-fid",
    convert=True,
)
_DINOV2 = Published(files=("model",), origin="facebook/dinov2-large")
_CLIP = Published(files=FILES, origin="laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 32

# Prepared images to what a network makes of them, `[n, d]`; the parameters first.
Extract = Callable[[Any, Any], Array]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FeatureDistance(Scorer):
    """A Frechet distance to real images.

    Attributes:
      prepare: uint8 `[n, h, w, 3]` to what `extract` reads, on the host.
      extract: see there.
      mean: of the real images' features, `[d]`.
      covariance: theirs, `[d, d]`.
    """

    name: str
    params: Any
    prepare: Callable[[np.ndarray], np.ndarray]
    extract: Extract
    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    threshold: float | None = None
    differentiable: bool = False

    @property
    def measures(self) -> Sequence[Measure]:
        """The one distance."""
        return (Measure(key=self.name, title=self.name, higher_is_better=False),)

    def check(self, prompts: Sequence[str], annotations: Annotations) -> None:
        """Raises a ValueError for fewer than two images, which have no covariance."""
        del annotations
        if len(prompts) < 2:
            raise ValueError(f"score {self.name!r} compares sets: give at least 2 prompts")

    def values(
        self, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """The features of each image."""
        del prompts, annotations
        return {"features": features(self.extract, self.params, self.prepare, images)}

    def summarise(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The distance of a set's features."""
        own = Moments.of(values["features"])
        found = frechet.gaussian_distance(own.mean, own.covariance, self.mean, self.covariance)
        return {self.name: found}


def features(
    extract: Extract,
    params: Any,
    prepare: Callable[[np.ndarray], np.ndarray],
    images: UInt8[np.ndarray, "n h w 3"],
) -> Float[np.ndarray, "n d"]:
    """Features of images, in batches that are prepared one by one."""

    def read(rows: np.ndarray) -> tuple[np.ndarray]:
        return (prepare(images[rows]),)

    return in_batches(_compiled(extract), params, read, len(images), _BATCH)


@functools.lru_cache(maxsize=16)
def _compiled(extract: Extract) -> Extract:
    return jax.jit(extract)


def resize_float(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 299 299 3"]:
    """As clean-fid: each channel by Pillow's bicubic in float, clipped to 0..255, not rounded."""

    def channel(values: np.ndarray) -> np.ndarray:
        image = Image.fromarray(values.astype(np.float32))
        return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)).clip(0, 255)

    return np.stack(
        [np.stack([channel(image[..., i]) for i in range(3)], axis=-1) for image in images]
    )


def resize_512(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 299 299 3"]:
    """As DMD2's evaluation: to 512 x 512 by Pillow's Lanczos, rounded, then as `resize_float`."""
    size = (512, 512)
    smaller = [Image.fromarray(each).resize(size, Image.Resampling.LANCZOS) for each in images]
    return resize_float(np.stack([np.asarray(each) for each in smaller]))


def middle(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 299 299 3"]:
    """The middle 299 x 299 pixels, 0..255.

    Raises:
      ValueError: the images are smaller.
    """
    height, width = images.shape[1:3]
    if min(height, width) < _SIDE:
        raise ValueError(f"patch_fid needs images of at least {_SIDE} pixels, not {height}x{width}")
    top, left = (height - _SIDE) // 2, (width - _SIDE) // 2
    return images[:, top : top + _SIDE, left : left + _SIDE].astype(np.float32)


def _load_inception(path: str, *, name: str) -> FeatureDistance:
    tensors, folder = open_weights(name, path, _INCEPTION)
    weights = {
        key: Place(key)
        for key in tensors
        if not key.startswith(("fc.", "AuxLogits.")) and not key.endswith("num_batches_tracked")
    }
    if "Conv2d_1a_3x3.conv.weight" not in weights:
        raise ValueError(f"{path} holds no Inception of the FID: no Conv2d_1a_3x3.conv.weight")
    network = FIDInception(32 // len(tensors["Conv2d_1a_3x3.conv.weight"]))
    inputs = (jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32),)
    params = read_params(PlacedTensors(tensors, weights), network, inputs, path)

    def extract(params: Any, images: Array) -> Array:
        return network.apply({"params": params}, (images - 128) / 128)

    prepares = {"fid": resize_float, "fid_512": resize_512, "patch_fid": middle}
    return _against_real(name, folder, params, prepares[name], extract)


def _load_dinov2(path: str) -> FeatureDistance:
    tensors, folder = open_weights("fd_dinov2", path, _DINOV2)
    weights = {key: Place(key) for key in tensors if key != "embeddings.mask_token"}
    try:
        width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
        count = tensors["embeddings.position_embeddings"].shape[1] - 1
    except KeyError as error:
        raise ValueError(f"{path} holds no DINOv2: it has no {error.args[0]}") from None
    layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")}
    network = DINOv2(
        DINOv2Config(
            hidden_size=width,
            num_hidden_layers=len(layers),
            patch_size=patch,
            trained_grid=round(count**0.5),
        )
    )
    preprocess = Preprocess(
        size=16 * patch, fit="squash", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    side = preprocess.size
    inputs = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)
    params = read_params(PlacedTensors(tensors, weights), network, inputs, path)
    return _against_real(
        "fd_dinov2", folder, params, preprocess.on_host, _normalised(network, preprocess)
    )


def _load_clip(path: str) -> FeatureDistance:
    network, params, folder = load_clip("fd_clip", path, "ViT-L-14", _CLIP)
    preprocess = Preprocess(size=network.config.vision.image_size, fit="squash")
    extract = _normalised(network, preprocess, method="class_token")
    return _against_real("fd_clip", folder, params, preprocess.on_host, extract)


def _normalised(network: nn.Module, preprocess: Preprocess, **method: str) -> Extract:
    """What a network makes of images in 0..255."""

    def extract(params: Any, images: Array) -> Array:
        pixels = preprocess.pixels(images.astype(jnp.float32) / 255)
        return network.apply({"params": params}, pixels, **method)

    return extract


def _against_real(
    name: str, folder: Path, params: Any, prepare: Callable, extract: Extract
) -> FeatureDistance:
    """The score, with the statistics of the real images beside its weights.

    Raises:
      FileNotFoundError: there are neither images nor statistics.
      ValueError: the statistics are of other features, or are damaged.
    """
    if (stored := folder / "real.npz").is_file():
        mean, covariance = _read_statistics(stored)
    elif (named := folder / "real.txt").is_file():
        source = named.read_text(encoding="utf-8").strip()
        images = read_images(source)
        mean, covariance = _statistics(name, folder, source, images, params, prepare, extract)
    elif (real := folder / "real").is_dir():
        files = sorted(f for f in real.rglob("*") if f.suffix.lower() in _IMAGES)
        states = [(str(f.relative_to(folder)), *_stat(f)) for f in files]
        images = map(_read_image, files)
        mean, covariance = _statistics(name, folder, repr(states), images, params, prepare, extract)
    else:
        raise FileNotFoundError(
            f"score {name!r} compares with real images: put them into {folder / 'real'}, a "
            f"set's name into {named}, or their statistics (mu and sigma) into {stored}"
        )
    probe = np.zeros((1, _SIDE, _SIDE, 3), np.uint8)
    width = jax.eval_shape(extract, params, prepare(probe)).shape[1]
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{folder}: the statistics are of {len(mean)} features, and score {name!r} has {width}"
        )
    return FeatureDistance(
        name=name,
        params=params,
        prepare=prepare,
        extract=extract,
        mean=mean,
        covariance=covariance,
    )


def _read_statistics(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = read_npz(file, ("mu", "sigma"))
        return np.asarray(found["mu"], np.float64), np.asarray(found["sigma"], np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no statistics, mu and sigma ({error})") from None


def _statistics(
    name: str,
    folder: Path,
    source: str,
    images: Iterator[UInt8[np.ndarray, "h w 3"]],
    params: Any,
    prepare: Callable,
    extract: Extract,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the real images, computed once for what `source` describes.

    Raises:
      FileNotFoundError: fewer than two images.
    """
    state = hashlib.sha256(source.encode()).hexdigest()
    kept = folder / f"real-{name}.npz"
    if kept.is_file():
        try:
            found = read_npz(kept, ("state", "mu", "sigma"))
            if str(found["state"]) == state:
                return found["mu"], found["sigma"]
        except ValueError as error:
            logging.warning("%s; it is made again", error)
    logging.info("%s: features of the real images, once", name)
    moments, count = None, 0
    while batch := [prepare(image[None]) for image in itertools.islice(images, _BATCH)]:
        # Prepared already.
        part = features(extract, params, lambda each: each, np.concatenate(batch))
        moments = Moments.of(part) if moments is None else moments.update(part)
        count += len(batch)
    if moments is None or count < 2:
        raise FileNotFoundError(f"{folder}: the real images are {count}; give at least 2")
    with atomic_write(kept) as unnamed, unnamed.open("wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.covariance, state=np.array(state))
    return moments.mean, moments.covariance


def _stat(file: Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


def _read_image(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image ({error}); remove it") from None


LOADERS: Mapping[str, Callable[[str], FeatureDistance]] = {
    "fid": functools.partial(_load_inception, name="fid"),
    "fid_512": functools.partial(_load_inception, name="fid_512"),
    "patch_fid": functools.partial(_load_inception, name="patch_fid"),
    "fd_dinov2": _load_dinov2,
    "fd_clip": _load_clip,
}
