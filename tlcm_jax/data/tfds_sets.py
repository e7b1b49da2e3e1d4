"""Sets of TensorFlow Datasets, read without TensorFlow: `tfds:NAME@SPLIT[#FEATURE]`.

NAME is the set's with its config and version, SPLIT may be cut: `tfds:coco_captions/2017@val`,
`tfds:coco_captions/2014:1.1.0@val[:5000]#captions/text`. The set must have been prepared, as
array_record, under `TFDS_DATA_DIR` (`tfds build NAME --file_format=array_record`); nothing is
downloaded here. Of a feature that holds several texts an example's first is taken; where the
examples have an `image/id`, they are in its order, as the papers take COCO's.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

PREFIX = "tfds:"
_FORM = re.compile(r"tfds:(?P<name>[\w/:.+-]+)@(?P<split>[^#]+)(#(?P<feature>[\w/-]+))?")
_TEXTS = ("captions/text", "captions", "prompt", "caption", "text")
_ORDER = "image/id"


def is_set(path: object) -> bool:
    """Whether a path names a set and not a file."""
    return isinstance(path, str) and path.startswith(PREFIX)


def set_name(path: str) -> str:
    """A set as the name of a file: `coco_captions-2017-val`."""
    found = _parse(path)
    return re.sub(r"[^\w.]+", "-", f"{found['name']}-{found['split']}").strip("-")


def read_texts(path: str) -> list[str]:
    """The texts of a set, one an example.

    Raises:
      FileNotFoundError: it is not prepared here.
      ValueError: it has no such split or feature, or no text.
    """
    feature = _parse(path)["feature"]
    found = []
    for number, example in enumerate(source := _open(path, (feature,) if feature else _TEXTS)):
        names = (feature,) if feature else _TEXTS
        value = next((v for name in names if (v := _at(example, name)) is not None), None)
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
            value = value[0] if len(value) else ""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if not isinstance(value, str):
            raise ValueError(f"{path}: example {number} has no text; name the feature, {path}#NAME")
        if text := " ".join(value.split()):
            found.append((_at(example, _ORDER) or number, text))
    if not found:
        raise ValueError(f"{path} holds no text in its {len(source)} examples")
    return [text for _, text in sorted(found, key=lambda each: each[0])]


def read_images(path: str) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The images of a set, of its feature `image` if none is named.

    Raises:
      FileNotFoundError: it is not prepared here.
      ValueError: it has no such split or feature.
    """
    feature = _parse(path)["feature"] or "image"
    for example in _open(path, (feature,)):
        image = np.asarray(_at(example, feature))
        if image.ndim != 3 or image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
            raise ValueError(f"{path}: {feature!r} is no image but {image.dtype} {image.shape}")
        yield np.broadcast_to(image, (*image.shape[:2], 3))


def _parse(path: str) -> dict[str, str]:
    if not (found := _FORM.fullmatch(path)):
        raise ValueError(f"{path!r}: write tfds:NAME@SPLIT or tfds:NAME@SPLIT#FEATURE")
    return found.groupdict()


def _open(path: str, features: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """The examples, decoded as far as they are asked for."""
    given = _parse(path)
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            f"{path} needs TensorFlow Datasets: pip install tensorflow-datasets "
            "importlib_resources array_record"
        ) from None
    build = f"`tfds build {given['name']} --file_format=array_record`"
    builder = _said(path, lambda: tfds.builder(given["name"]), f"prepare it by {build}")
    known = list(builder.info.splits)
    split = given["split"]
    if not known:
        raise FileNotFoundError(f"{path} is not prepared in {builder.data_dir}: {build}")
    if re.split(r"[\[+]", split)[0] not in known:
        raise ValueError(f"{path}: the set has no split {split!r} but {', '.join(known)}")
    there = builder.info.features
    if not any(name in there or name.split("/")[0] in there for name in features):
        raise ValueError(
            f"{path}: the set has no feature {' or '.join(features)} but {', '.join(there)}"
        )
    skipped = {
        name: tfds.decode.SkipDecoding()
        for name, feature in there.items()
        if isinstance(feature, tfds.features.Image) and name not in features
    }
    return _said(
        path,
        lambda: builder.as_data_source(split=split, decoders=skipped or None),
        f"prepare it by {build}",
    )


def _said(path: str, call: Callable, hint: str) -> Any:
    """What a call returns; its failure in one line."""
    try:
        return call()
    except Exception as error:  # TFDS raises many kinds, some of them TensorFlow's
        line = " ".join(str(error).split())[:150]
        raise FileNotFoundError(f"{path} cannot be read ({line}); {hint}") from None


def _at(example: Any, name: str) -> Any:
    """A feature by its path; None if it is not there."""
    if isinstance(example, Mapping) and name in example:
        return example[name]
    for part in name.split("/"):
        if not isinstance(example, Mapping) or part not in example:
            return None
        example = example[part]
    return example
