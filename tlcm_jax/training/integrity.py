"""Whether a checkpoint's files are the bytes that were saved: a list of SHA-256 sums beside them.

`SHA256SUMS` has the form of coreutils, so `sha256sum -c SHA256SUMS` checks it as well. It is
written before the checkpoint gets its name: one that has a name has a list. The two files that
are written with the name are added to it afterwards.
"""

import hashlib
import os
import re
from pathlib import Path

from tlcm_jax.io.files import sync

SUMS = "SHA256SUMS"
_PART = SUMS + ".part"
# What Orbax writes last, together with the name.
_WITH_THE_NAME = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


def write_sums(folder: Path) -> None:
    """Lists every file that is final; each is on the disk, not only in memory, when this returns.

    Args:
      folder: of a checkpoint that has not got its name yet.
    """
    for path in _files(folder).values():
        sync(path)
    _write(folder, {name: p for name, p in _files(folder).items() if name not in _WITH_THE_NAME})


def add_late_sums(folder: Path) -> None:
    """Adds what was written since to the list, once the checkpoint has its name."""
    if (folder / SUMS).is_file():
        _write(folder, _files(folder))


def remove_unfinished(folder: Path) -> None:
    """Removes the list that a run was killed at writing; the one before it is whole."""
    (folder / _PART).unlink(missing_ok=True)


def has_sums(folder: Path) -> bool:
    """Whether a checkpoint can be checked; those of older versions cannot."""
    return (folder / SUMS).is_file()


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, in a few words; "" if nothing is.

    Args:
      folder: of a checkpoint with a list.
    """
    try:
        text = (folder / SUMS).read_bytes().decode("ascii")
    except (OSError, ValueError):
        return f"{SUMS} is damaged"
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    if not text.endswith("\n") or None in lines:
        return f"{SUMS} is damaged"
    listed = {line[2]: line[1] for line in lines if line}
    there = _files(folder)
    for name in sorted(set(listed) - set(there)):
        return f"{name} is missing"
    for name in sorted(set(there) - set(listed) - _WITH_THE_NAME):
        return f"{name} is not of it"
    for name, wanted in listed.items():
        try:
            found = _sum(there[name])
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != wanted:
            return f"{name} has changed since it was saved"
    return ""


def _files(folder: Path) -> dict[str, Path]:
    """All files but the list, by their place in the folder."""
    found = sorted(Path(top) / name for top, _, names in os.walk(folder) for name in names)
    named = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in named.items() if name not in (SUMS, _PART)}


def _write(folder: Path, files: dict[str, Path]) -> None:
    text = "".join(f"{_sum(path)}  {name}\n" for name, path in files.items())
    part = folder / _PART
    part.write_text(text, encoding="ascii")
    sync(part)
    os.replace(part, folder / SUMS)
    sync(folder, deep=False)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
