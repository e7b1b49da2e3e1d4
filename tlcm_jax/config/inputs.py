"""What a run was begun with, by content: its prompts, its latents and its teacher's files.

`inputs.json` in the workdir holds their SHA-256. A resumed run whose files have others content is
refused; one whose files have moved is not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from tlcm_jax.config.controls import control_contents
from tlcm_jax.config.schema import Settings
from tlcm_jax.families.load import find_family
from tlcm_jax.io.json_files import read_object
from tlcm_jax.io.lora_sources import find_lora
from tlcm_jax.io.lora_stack import split_weight
from tlcm_jax.training.workdir import write_atomically

INPUTS_FILE = "inputs.json"
# The keys of a recipe that name what is remembered here.
KEYS = {
    "prompts": "prompts", "latents": "latents", "teacher": "model.path", "loras": "model.loras",
    "controls": "model.controls",
}  # fmt: skip
_KINDS = frozenset({".safetensors", ".json", ".txt", ".model"})


class Inputs:
    """What this command was given, and what the workdir remembers."""

    def __init__(self, workdir: str | Path, settings: Settings, prompts: Sequence[str]):
        """Reads both; the teacher's files only where they are not those that were hashed before.

        Args:
          workdir: the run's folder; it may not be there yet.
          settings: the recipe.
          prompts: the texts that its prompt files hold.
        """
        self._path = Path(workdir) / INPUTS_FILE
        self._before = _read(self._path)
        self._now: dict[str, Any] = {
            "prompts": _hash_texts(prompts),
            "latents": _hash_file(Path(settings.latents)) if settings.latents else "",
            "teacher": _teacher(settings.model.path, self._before.get("teacher")),
            "loras": [_hash_lora(spec) for spec in settings.model.loras],
            "controls": control_contents(settings.model),
        }

    @property
    def contents(self) -> dict[str, Any]:
        """Of the prompts, the teacher and its LoRAs, by content alone."""
        return contents_of(self._now)

    @property
    def moved(self) -> tuple[str, ...]:
        """Keys of the recipe that may differ from the workdir's, since what they name does not."""
        return tuple(key for name, key in KEYS.items() if self._same(name))

    def check(self) -> None:
        """Raises a ValueError that names what has changed since the run began."""
        changed = [name for name in KEYS if name in self._before and not self._same(name)]
        if changed:
            raise ValueError(
                f"the {' and the '.join(changed)} of the run in {self._path.parent} changed after "
                "it began, though the recipe may name the same files: bring them back, or use "
                f"another workdir (remove {self._path} to go on with the new ones all the same)"
            )

    def write(self) -> None:
        """Remembers what this command was given."""
        if self._now != self._before:
            text = json.dumps(self._now, indent=1, sort_keys=True)
            write_atomically(self._path, text + "\n")

    def _same(self, name: str) -> bool:
        return name in self._before and _content(self._before[name]) == _content(self._now[name])


def read_contents(settings: Settings, prompts: Sequence[str]) -> dict[str, Any]:
    """As `Inputs.contents`, of a recipe without a run; reads the teacher's files."""
    teacher = _teacher(settings.model.path, None)
    loras = [_hash_lora(spec) for spec in settings.model.loras]
    return contents_of({"prompts": _hash_texts(prompts), "teacher": teacher, "loras": loras})


def contents_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is remembered of prompts, teacher and its LoRAs, without names and dates."""
    return {name: _content(found[name]) for name in ("prompts", "teacher", "loras")}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, "workdir")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logging.warning("%s; what the run began with is not known any more", error)
        return {}


def _teacher(path: str, before: Any) -> dict[str, dict[str, Any]]:
    """By file of the teacher: its hash, and by what to see that it need not be read again."""
    known = before if isinstance(before, Mapping) else {}
    found = {}
    for name, file in _teacher_files(path).items():
        stat = file.stat()
        seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
        old = known.get(name)
        old = old if isinstance(old, Mapping) else {}
        same = old.get("sha256") and all(old.get(key) == value for key, value in seen.items())
        found[name] = {**seen, "sha256": old["sha256"] if same else _hash_file(file)}
    return found


def _teacher_files(path: str) -> dict[str, Path]:
    """A single file, or the weights, configs and tokenizers of a pipeline's components."""
    if Path(path).is_file():
        return {"file": Path(path)}
    folder = find_family(path)[1]
    # Not what lies beside them, such as a single file of the same model.
    files = sorted(p for p in folder.glob("*/**/*") if p.suffix in _KINDS and p.is_file())
    return {p.relative_to(folder).as_posix(): p for p in files}


def _content(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    # Of a teacher: the files by their content, whatever their names' folder and dates.
    return sorted(str(file.get("sha256")) for file in value.values() if isinstance(file, Mapping))


def _hash_lora(spec: str) -> str:
    path, weight = split_weight(spec)
    return f"{_hash_file(find_lora(path)[0])} {weight:g}"


def _hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
