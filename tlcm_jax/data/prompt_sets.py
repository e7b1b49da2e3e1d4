"""Prompts to evaluate on, with what each of them asks for where that is known."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.data.prompt_files import split_column
from tlcm_jax.data.prompts import read_prompts
from tlcm_jax.data.tfds_sets import is_set, set_name
from tlcm_jax.io.json_files import read_json

_LARGEST = 256 * 2**20  # bytes of captions; COCO's 2017 training set has 92 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Named prompts.

    Attributes:
      name: such as "heldout".
      prompts: n texts.
      annotations: lists of n, by key: what each prompt asks for, such as its `label` and `style`.
        Empty where nothing is known but the text.
    """

    name: str
    prompts: tuple[str, ...]
    annotations: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name == ".." or not self.name.isprintable():
            raise ValueError(f"prompt set {self.name!r}: its name must be one of a file")
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} is empty: give at least one prompt")
        for key, values in self.annotations.items():
            if len(values) != len(self.prompts):
                raise ValueError(
                    f"prompt set {self.name!r} has {len(self.prompts)} prompts "
                    f"but {len(values)} values of {key!r}"
                )

    def first(self, count: int) -> "PromptSet":
        """The first `count` prompts; all of them where count is 0."""
        if count < 0:
            raise ValueError(f"a limit of {count} prompts: must be 0 (all) or positive")
        if not count or count >= len(self.prompts):
            return self
        return self.rows(range(count))

    def rows(self, rows: Iterable[int]) -> "PromptSet":
        """Some of the prompts."""
        rows = list(rows)
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            annotations={key: [v[i] for i in rows] for key, v in self.annotations.items()},
        )


def read_prompt_set(path: str | os.PathLike, name: str = "") -> PromptSet:
    """Reads prompts from any of these, by their suffix.

    | file | prompts |
    |---|---|
    | COCO's captions, `.json` | each image's first caption in the file, images by their id |
    | MJHQ-30K's `meta_data.json` | each image's, in the file's order; its category beside it |
    | `tfds:NAME@SPLIT` | `data.tfds_sets` |
    | any other | text or a table: `data.prompt_files` |

    Beside a text file a JSON file of the same name may say more: a list with one object a prompt,
    in order, each with the same keys; `prompt` is the text as the prompt file has it, the other
    keys are annotations.

    Args:
      path: see above.
      name: of the set; the file's stem by default.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no prompt file, or the JSON beside it does not belong to it.
    """
    if is_set(path):
        return PromptSet(name=name or set_name(str(path)), prompts=tuple(read_prompts([path])))
    path, _ = split_column(given := path)
    if path.suffix == ".json":
        prompts, annotations = _read_captions(path)
        return PromptSet(name=name or path.stem, prompts=prompts, annotations=annotations)
    prompts = tuple(read_prompts([given]))
    beside = path.with_suffix(".json")
    annotations = {}
    if beside != path and beside.is_file():
        annotations = _read_annotations(beside, path, prompts)
    return PromptSet(name=name or path.stem, prompts=prompts, annotations=annotations)


def _read_annotations(beside: Path, path: Path, prompts: Sequence[str]) -> dict[str, list]:
    try:
        rows = read_json(beside, "prompts")
    except ValueError as error:
        raise ValueError(f"{error}: correct or remove it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{beside} must be a list of objects, one a prompt: correct or remove it")
    texts = [row.get("prompt") for row in rows]
    if texts != list(prompts):
        line = next(
            (
                i
                for i, (text, prompt) in enumerate(zip(texts, prompts, strict=False))
                if text != prompt
            ),
            min(len(texts), len(prompts)),
        )
        raise ValueError(
            f"{beside} does not belong to {path}: they differ from prompt {line + 1} on "
            f"({len(texts)} and {len(prompts)} prompts); make them equal, or remove the former"
        )
    keys = [key for key in rows[0] if key != "prompt"]
    for number, row in enumerate(rows, 1):
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"{beside}: entry {number} lacks {missing[0]!r}, which others have")
    return {key: [row[key] for row in rows] for key in keys}


def _read_captions(path: Path) -> tuple[tuple[str, ...], dict[str, list]]:
    """Of COCO's `captions_*.json` or MJHQ-30K's `meta_data.json`: see `read_prompt_set`."""
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    try:
        found = read_json(path, "prompts", _LARGEST)
        if "annotations" not in found:
            rows = list(found.values())
            categories = [str(row["category"]) for row in rows]
            return tuple(" ".join(row["prompt"].split()) for row in rows), {"category": categories}
        first: dict[int, str] = {}
        for annotation in found["annotations"]:
            first.setdefault(int(annotation["image_id"]), str(annotation["caption"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not COCO's captions, a JSON object with `annotations`, nor MJHQ-30K's "
            f"({error!r}); for prompts of your own give a text file, a .csv or a .jsonl"
        ) from None
    return tuple(" ".join(first[image].split()) for image in sorted(first)), {}
