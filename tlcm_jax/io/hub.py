"""Pipelines and LoRAs from the Hugging Face hub: `ORGANISATION/NAME[@REVISION]`.

Only what a pipeline here is made of is fetched: configs, tokenizers and one set of safetensors a
network, not the same weights again in other dtypes and formats. A fetch that was broken off goes
on where it stopped, and what is there already is not fetched again (huggingface_hub's cache).
Where the hub cannot be reached, for whatever reason, what an earlier fetch left in the cache is
taken, with a warning.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from tlcm_jax.io.pipeline_index import INDEX_FILE, OPTIONAL, read_index
from tlcm_jax.io.tensors import STEMS, shard_names, weights_name

_TOP = re.compile(r"model_index\.json|README\.md|LICENSE(\.md|\.txt)?")
_TEXT = re.compile(r"(?!.*\.safetensors\.index)[^/]+\.(json|txt|model)")
_GONE = (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)


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
        not in the cache, or not whole.
    """

    def choose(folder: Path, listed: Sequence[str]) -> list[str]:
        if INDEX_FILE not in listed:
            return []
        components = read_index(folder).components.keys() - OPTIONAL
        return needed(listed, components, weights, variant)

    return _fetch(source, choose, lambda folder: _lacks(folder, weights, variant))


def fetch_files(source: HubId, choose: Callable[[Sequence[str]], Collection[str]]) -> Path:
    """Fetches some files of a repository, or finds them in the cache.

    Args:
      source: the repository.
      choose: names those of the repository's files that are wanted.

    Returns:
      The local folder that holds them.

    Raises:
      FileNotFoundError: as in `fetch`, and whatever `choose` raises.
    """

    def cached(folder: Path) -> str | None:
        here = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        try:
            return None if choose(here) else "holds none of the files wanted"
        except (FileNotFoundError, ValueError) as error:
            return str(error)

    return _fetch(source, lambda folder, listed: [*choose(listed)], cached)


def _fetch(
    source: HubId,
    choose: Callable[[Path, Sequence[str]], list[str]],
    lacks: Callable[[Path], str | None],
) -> Path:
    """The local folder of the files that `choose` names, given the index and all names.

    `lacks` says what a cached folder lacks; None for nothing.
    """
    name, revision = source.repository, source.revision
    try:
        # By name first: this is what leaves, in the cache, which commit the name stood for.
        folder = Path(
            _reach(snapshot_download, name, revision=revision, allow_patterns=[INDEX_FILE])
        )
        # By commit, so that all files are of one version whatever is pushed meanwhile.
        info = _reach(HfApi().model_info, name, revision=folder.name)
        listed = [file.rfilename for file in info.siblings or ()]
        if files := choose(folder, listed):
            _reach(snapshot_download, name, revision=folder.name, allow_patterns=files)
        return folder
    except GatedRepoError as error:
        reason = f"{name} is gated ({_first_line(error)})"
        refusal = f"{name!r} is gated; accept its terms on the hub and log in with `hf auth login`"
    except _GONE as error:
        reason = f"the hub has no such repository ({_first_line(error)})"
        refusal = (
            f"{name!r} is no folder or file here, and the hub has no such repository"
            + (f" of revision {revision!r}" if revision else "")
            + f" ({_first_line(error)}); give a pipeline folder, a checkpoint or a hub id"
        )
    except _UnreachableError as error:
        reason, refusal = f"the hub cannot be reached ({error})", ""
    missing = ""
    for folder in _cached(source):
        missing = lacks(folder) or ""
        if not missing:
            logging.warning("%s; taking %s from the cache, commit %s", reason, name, folder.name)
            return folder
    where = f"the cache's copy is not whole: {missing}" if missing else "it is not in the cache"
    raise FileNotFoundError(
        refusal
        or f"{name!r} is no folder or file here, {reason} and {where}; fetch it where there is a "
        "network, or give a local folder"
    )


class _UnreachableError(Exception):
    """The hub did not answer, or not as a hub does."""


def _reach(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Asks the hub.

    Raises:
      RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError: as it answers.
      _UnreachableError: anything else. The client, the operating system, a proxy and a portal's web
        page in place of JSON have each errors of their own.
    """
    try:
        return call(*args, **options)
    except _GONE:
        raise
    except Exception as error:
        raise _UnreachableError(_first_line(error)) from None


def _cached(source: HubId) -> Iterator[Path]:
    """The snapshots in the cache that a source may be, the likeliest first."""
    store = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=source.repository, repo_type="model"
    )
    snapshots = store / "snapshots"
    reference = store / "refs" / (source.revision or constants.DEFAULT_REVISION)
    first = source.revision or ""
    if reference.is_file():
        first = reference.read_text(encoding="utf-8").strip()
    if first and (snapshots / first).is_dir():
        yield snapshots / first
    if source.revision is None and snapshots.is_dir():
        others = [path for path in snapshots.iterdir() if path.is_dir() and path.name != first]
        yield from sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def _lacks(folder: Path, weights: bool, variant: str | None) -> str | None:
    """What a cached pipeline folder lacks, if anything: a fetch may have been broken off."""
    if not (folder / INDEX_FILE).is_file():
        return f"no {INDEX_FILE}"
    for name in sorted(read_index(folder).components.keys() - OPTIONAL):
        files = [path.name for path in (folder / name).glob("*") if path.exists()]
        if not files:
            return f"nothing of {name}"
        if not weights or "config.json" not in files:
            continue
        first = next(filter(None, (weights_name(files, stem, variant) for stem in STEMS)), None)
        if first is None:
            return f"no weights of {name}"
        if first.endswith(".json") and set(shard_names(folder / name / first)) - set(files):
            return f"not all shards of {name}"
    return None


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
