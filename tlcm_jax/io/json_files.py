"""JSON configs: one reader, which takes whatever a file holds for data, and names the file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Parsed = TypeVar("Parsed")

# Counts of layers, which are traced one by one, and any other number: beyond what a network has.
_DEPTHS = frozenset(
    {
        "layers_per_block",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "num_hidden_layers",
    }
)
_DEEPEST, _LARGEST, _LONGEST = 200, 1_000_000, 10_000


def read_object(path: Path, holder: str = "model folder") -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      path: the file.
      holder: what it is a part of, for messages.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the {holder} is not whole")
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise ValueError("it is a git-lfs pointer, run `git lfs pull`")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def parse(
    path: Path, raw: Mapping[str, Any], kind: Callable[[Mapping[str, Any]], Parsed]
) -> Parsed:
    """What a config describes; whatever is wrong with it is an error that names the file.

    Args:
      path: of the config.
      raw: its content.
      kind: makes the result.

    Raises:
      ValueError: a number that no model has, a key that is missing, a value of the wrong type, or
        what `kind` itself refuses.
    """
    try:
        _check_numbers(raw)
        return kind(raw)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: a value is not of the type it must have ({reason})") from None


def _check_numbers(value: Any, key: str = "") -> None:
    """Raises a ValueError for numbers that would fill the memory, or be traced for hours."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_numbers(inner, name)
    elif isinstance(value, list):
        if len(value) > _LONGEST:
            raise ValueError(f"{key} holds {len(value)} values, over {_LONGEST}")
        for inner in value:
            _check_numbers(inner, key)
    elif isinstance(value, int | float):
        limit = _DEEPEST if key in _DEPTHS else _LARGEST
        if not abs(value) <= limit:
            raise ValueError(f"{key} = {value}: must be at most {limit}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, keys in order, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def strip_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where it once lay: a path of the machine that saved it."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}
