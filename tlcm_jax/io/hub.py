"""Pipelines from the Hugging Face hub: `ORGANISATION/NAME`, or `ORGANISATION/NAME@REVISION`.

Only what a pipeline here is made of is fetched: configs, tokenizers and one set of safetensors a
network, not the same weights again in other dtypes and formats. A fetch that was broken off goes
on where it stopped, and what is there already is not fetched again (huggingface_hub's cache).
"""

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from absl import logging
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tlcm_jax.io.pipeline_index import INDEX_FILE, OPTIONAL, read_index
from tlcm_jax.io.tensors import STEMS, weights_name

_TOP = re.compile(r"model_index\.json|README\.md|LICENSE(\.md|\.txt)?")
_TEXT = re.compile(r"(?!.*\.safetensors\.index)[^/]+\.(json|txt|model)")
_GONE = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)


@dataclasses.dataclass(frozen=True)
class HubId:
    """A repository of the hub.

    Attributes:
      repository: `ORGANISATION/NAME`.
      revision: a branch, tag or commit; None is the newest of the default branch.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> "HubId | None":
        """The id that a text is; None for a path that exists or could not be an id."""
        match = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?", str(text))
        if match is None or Path(text).exists():
            return None
        return cls(match[1], match[2])


def fetch(source: HubId, *, weights: bool = True, variant: str | None = None) -> Path:
    """Fetches a pipeline, or finds it in the cache.

    Args:
      source: the repository.
      weights: False leaves out the networks' weights.
      variant: as in `tensors.weights_name`.

    Returns:
      The local folder: a diffusers pipeline folder.

    Raises:
      FileNotFoundError: there is no such repository or revision, or it cannot be reached and is
        not in the cache.
    """
    name, revision = source.repository, source.revision
    try:
        info = HfApi().model_info(name, revision=revision)
        listed = [file.rfilename for file in info.siblings or ()]
        # By commit, so that all files are of one version whatever is pushed meanwhile.
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=[INDEX_FILE]))
        if INDEX_FILE in listed:
            components = read_index(folder).components.keys() - OPTIONAL
            files = needed(listed, components, weights, variant)
            folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
        return folder
    except _GONE as error:
        raise FileNotFoundError(
            f"{name!r} is no folder or file here, and the hub has no such repository"
            + (f" of revision {revision!r}" if revision else "")
            + f" ({_first_line(error)}); give a pipeline folder, a checkpoint or a hub id"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = _first_line(error)
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, *_GONE, OSError):
        raise FileNotFoundError(
            f"{name!r} is no folder or file here, and the hub cannot be reached ({reason}); give a "
            "pipeline folder, or fetch it where there is a network"
        ) from None
    logging.warning("the hub cannot be reached (%s); taking %s from the cache", reason, name)
    return folder


def needed(
    names: Sequence[str],
    components: Collection[str],
    weights: bool = True,
    variant: str | None = None,
) -> list[str]:
    """Which of a repository's files a pipeline is read from.

    Args:
      names: all its files, with their folders.
      components: the folders of its components.
      weights: False leaves out the networks' weights.
      variant: as in `tensors.weights_name`.
    """
    chosen, folders = [], dict[str, list[str]]()
    for name in names:
        folder, _, file = name.rpartition("/")
        if _TOP.fullmatch(name) or (folder in components and _TEXT.fullmatch(file)):
            chosen.append(name)
        if folder in components:
            folders.setdefault(folder, []).append(file)
    for folder, files in folders.items() if weights else ():
        found = [(stem, weights_name(files, stem, variant)) for stem in STEMS]
        for stem, first in found:
            if first is None:
                continue  # the folder's reader says which network lacks what
            chosen.append(f"{folder}/{first}")
            if first.endswith(".json"):
                mark = re.fullmatch(r".*\.index(\.\w+)?\.json", first)[1]  # type: ignore[index]
                shards = [f for f in files if re.fullmatch(rf"{stem}.*-of-\d+.*\.safetensors", f)]
                chosen += [f"{folder}/{f}" for f in shards if _variant_of(f) == mark]
            break
    return chosen


def _variant_of(shard: str) -> str | None:
    """`.fp16` of `model.fp16-00001-of-00002.safetensors`; None without a variant."""
    inner = re.sub(r"-\d+-of-\d+", "", shard).removesuffix(".safetensors")
    return f".{inner.partition('.')[2]}" if "." in inner else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
