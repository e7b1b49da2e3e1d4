"""A run's folder: which config it belongs to, and files that are never half written."""

import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.io.files import sync
from tlcm_jax.io.json_files import read_object

CONFIG_FILE = "config.json"
_ABSENT = object()


def claim_workdir(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    may_change: Collection[str] = frozenset(),
    write: bool = True,
) -> None:
    """Makes the folder this config's, or raises when it is another's.

    The first run writes `config.json`; later ones compare with it, so that a checkpoint is never
    continued under settings it was not made with.

    Args:
      workdir: the run's folder; made if it is missing.
      config: the whole config as nested dicts of JSON values.
      may_change: dotted keys that may differ on resume (a key exempts everything below it); the
        file then takes their new values.
      write: False only compares.

    Raises:
      ValueError: the folder belongs to another config (naming each key, old -> new), or its
        config.json is unreadable.
      OSError: the folder cannot be written.
    """
    folder = Path(workdir)
    path = folder / CONFIG_FILE
    # Through JSON once: tuples become lists, as they will be when read back.
    new = json.loads(json.dumps(config))
    if path.exists():
        try:
            old = read_object(path, "workdir")
        except ValueError as error:
            raise ValueError(
                f"{error}. It holds nothing but the config: if this command is the one that the "
                "run was begun with, remove that one file and run it again; the checkpoints stay"
            ) from None
        changes = differing_keys(old, new)
        forbidden = {
            key: change
            for key, change in changes.items()
            if not any(key == free or key.startswith(free + ".") for free in may_change)
        }
        if forbidden:
            lines = "".join(f"\n  {key}: {change}" for key, change in forbidden.items())
            raise ValueError(
                f"{folder} belongs to a run with another config; use another workdir, or set these "
                f"back (old -> new):{lines}"
            )
        if not changes:
            return
    if not write:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(new, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        if not is_full(error):
            raise
        raise OSError(errno.ENOSPC, f"no space left to write {path}: free some") from error


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The dotted keys whose values differ, each with `old -> new` as text."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    shown = {}
    for key in sorted(set(flat_old) | set(flat_new)):
        before, after = flat_old.get(key, _ABSENT), flat_new.get(key, _ABSENT)
        if before is _ABSENT or after is _ABSENT or before != after:
            shown[key] = f"{_show(before)} -> {_show(after)}"
    return shown


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, over what was there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent, deep=False)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the disk (or its quota) is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Orbax reports a failed write of its storage library as a ValueError with this text.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, name + "."))
        else:
            flat[name] = value
    return flat


def _show(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
