"""Inputs that lie in a bucket: `gs://BUCKET/PATH`, a file or a folder, copied here and read here.

What a reader is given by such a name lies afterwards in `~/.cache/tlcm_jax/buckets`, whole or not
at all. The next command fetches what has changed since, by size and by what the store says of an
object's version; a fetch that was broken off goes on with the object that it stopped at. Pickles
are not fetched. The copying is fsspec's (for `gs://` with gcsfs: `pip install -e ".[gcs]"`).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from absl import logging

CACHE = os.path.join("~", ".cache", "tlcm_jax", "buckets")
_SCHEMES = ("gs", "s3")
_UNREAD = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".onnx", ".h5"})
# What stores call the version of an object; the first that is known counts.
_VERSIONS = ("generation", "ETag", "etag", "updated", "LastModified", "mtime", "created")
_VERSION_SUFFIX = ".version"


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path names a place in a bucket."""
    return re.match(rf"({'|'.join(_SCHEMES)})://", os.fspath(path)) is not None


def local(path: str | os.PathLike, cache: str = CACHE) -> Path:
    """Where a path's file or folder lies on this machine, fetched if it is in a bucket.

    Args:
      path: `gs://BUCKET/PATH`; any other path is given back as it is.
      cache: the folder of copies.

    Raises:
      FileNotFoundError: there is no such object or folder.
      ValueError: the store cannot be used: not installed, not logged in, no rights, no answer.
    """
    text = os.fspath(path)
    if not is_bucket(text):
        return Path(path)
    scheme, _, place = text.partition("://")
    place = place.rstrip("/")
    try:
        found = _listed(scheme, place)
    except ImportError as error:
        extra = ' (pip install -e ".[gcs]")' if scheme == "gs" else ""
        raise ValueError(f"{text} cannot be read: {_line(error)}{extra}") from None
    except FileNotFoundError:
        found = {}
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            f"{text} cannot be read: {_line(error)}; log in (for gs://: gcloud auth "
            "application-default login), or ask for the rights"
        ) from None
    if not found:
        raise FileNotFoundError(f"{text} does not exist: the bucket holds no file of that name")
    root = Path(os.path.expanduser(cache)) / scheme
    for name in found:
        if ".." in PurePosixPath(name).parts:
            raise ValueError(f"{text} cannot be read: an object is called {name}")
    for name, info in found.items():
        if PurePosixPath(name).suffix not in _UNREAD:
            _fetch(scheme, name, info, root)
    return root / place


def _listed(scheme: str, place: str) -> dict[str, Mapping[str, Any]]:
    """The objects at a place, by name: itself, or all below it."""
    store = fsspec.filesystem(scheme)
    store.invalidate_cache()
    found = store.find(place, detail=True)
    return {name.strip("/"): info for name, info in found.items() if not name.endswith("/")}


def _fetch(scheme: str, name: str, info: Mapping[str, Any], root: Path) -> None:
    """Copies an object, unless the copy is of this version."""
    version = [info.get("size"), *(str(info[key]) for key in _VERSIONS if key in info)][:2]
    copy = root / name
    mark = copy.with_name(f".{copy.name}{_VERSION_SUFFIX}")
    said = json.dumps(version)
    if copy.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == said:
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
    logging.info("fetching %s://%s (%.1f MB)", scheme, name, (info.get("size") or 0) / 1e6)
    try:
        with fsspec.filesystem(scheme).open(name, "rb") as source, part.open("wb") as into:
            shutil.copyfileobj(source, into, 16 << 20)
        mark.unlink(missing_ok=True)
        part.replace(copy)
        mark.write_text(said, encoding="utf-8")
    except Exception as error:
        raise ValueError(f"{scheme}://{name} could not be fetched: {_line(error)}") from None
    finally:
        part.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
