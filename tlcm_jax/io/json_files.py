"""JSON files: one reader, which takes whatever a file holds for data, and names the file.

What is read is checked before it is used: size and depth of the file, no key twice, only finite
numbers of a size that a model may have, and the types that a config's fields are declared with.
"""

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Parsed = TypeVar("Parsed")

# Bytes of a file: parsed, it takes some twenty times as much at worst. An index of shards has less
# than one.
_MAX_BYTES = 8 * 2**20
_MAX_DEPTH = 64
# The largest number that a key may have, where it is less than of any other: layers are traced one
# by one, sides are those of images, positions those of a text.
_LARGEST: Mapping[str, int] = {
    "layers_per_block": 200,
    "transformer_layers_per_block": 200,
    "reverse_transformer_layers_per_block": 200,
    "num_hidden_layers": 200,
    "layers": 200,
    "sample_size": 16_384,
    "image_size": 16_384,
    "num_train_timesteps": 100_000,
    "max_position_embeddings": 10_000,
}
_LARGEST_OTHER, _LONGEST, _LEVELS = 1_000_000, 100_000, 16
# Lists with an entry for each level of a network.
_PER_LEVEL = frozenset(
    {
        "attention_head_dim",
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "layers_per_block",
        "reverse_transformer_layers_per_block",
        "transformer_layers_per_block",
        "up_block_types",
    }
)


def read_json(path: Path, holder: str = "model folder", max_bytes: int = _MAX_BYTES) -> Any:
    """What a JSON file holds.

    Args:
      path: the file.
      holder: what it is a part of, for messages.
      max_bytes: of the file.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not JSON in UTF-8, or not as it may be (`parse_json`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the {holder} is not whole")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size} bytes; at most {max_bytes} are read of such a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> Any:
    """A JSON value.

    Args:
      text: of it.
      source: what it was read from, for messages.

    Raises:
      ValueError: it is not JSON, nested too deeply, gives a key twice, or has a number that is
        not finite.
    """
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{source} is not valid JSON: it is a git-lfs pointer, run `git lfs pull`")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"{source} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if _depth(value) > _MAX_DEPTH:
        raise ValueError(f"{source} is not valid JSON: nested too deeply")
    return value


def read_object(path: Path, holder: str = "model folder") -> dict[str, Any]:
    """The JSON object that a file holds; arguments and errors are `read_json`'s."""
    return as_object(read_json(path, holder), str(path))


def as_object(value: Any, source: str) -> dict[str, Any]:
    """A value that must be a JSON object; a ValueError that names its source if it is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{source} must hold a JSON object, not a {type(value).__name__}")
    return value


def parse(
    path: Path, raw: Mapping[str, Any], kind: Callable[[Mapping[str, Any]], Parsed]
) -> Parsed:
    """What a config describes; whatever is wrong with it is an error that names the file.

    Args:
      path: of the config.
      raw: its content.
      kind: makes the result; of a dataclass the fields' types are checked.

    Raises:
      ValueError: a number that no model has, a key that is missing, a value of the wrong type, or
        what `kind` itself refuses.
    """
    with naming(path):
        _check_numbers(raw)
        parsed = kind(raw)
        _check_fields(parsed)
    return parsed


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Makes whatever is wrong with a file's content one ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: a value is not of the type it must have ({reason})") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:100]!r} twice")
    return found


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _depth(value: Any) -> int:
    """How deep a value is nested; counted without recursion."""
    depth, level = 0, [value]
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
    return depth


def _check_numbers(value: Any, key: str = "") -> None:
    """Raises a ValueError for numbers that would fill the memory, or be traced for hours."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_numbers(inner, name)
    elif isinstance(value, list):
        longest = _LEVELS if key in _PER_LEVEL else _LONGEST
        if len(value) > longest:
            raise ValueError(f"{key} holds {len(value)} values, over {longest}")
        for inner in value:
            _check_numbers(inner, key)
    elif isinstance(value, int | float):
        limit = _LARGEST.get(key, _LARGEST_OTHER)
        if not abs(value) <= limit:
            raise ValueError(f"{key} = {_shown(value)}: must be at most {limit}")


def _check_fields(parsed: Any) -> None:
    """Raises a ValueError for a field of a dataclass that is not of its declared type.

    Whole numbers must not be negative; they pass for floats, and neither passes for a truth value.
    """
    if not dataclasses.is_dataclass(parsed):
        return
    hints = typing.get_type_hints(type(parsed))
    for field in dataclasses.fields(parsed):
        value, wanted = getattr(parsed, field.name), hints[field.name]
        if not _is_of(value, wanted):
            name = wanted.__name__ if isinstance(wanted, type) else wanted
            least = " of at least 0" * (wanted is int)
            raise ValueError(f"{field.name} = {_shown(value)}: must be {name}{least}")
        _check_fields(value)


def _is_of(value: Any, wanted: Any) -> bool:
    if wanted in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return whole or (wanted is float and isinstance(value, float))
    if wanted in (bool, str, types.NoneType):
        return isinstance(value, wanted)
    arguments = typing.get_args(wanted)
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        return any(_is_of(value, one) for one in arguments)
    if typing.get_origin(wanted) is tuple and len(arguments) == 2 and arguments[1] is ...:
        return isinstance(value, tuple) and all(_is_of(one, arguments[0]) for one in value)
    if typing.get_origin(wanted) is tuple:
        whole = isinstance(value, tuple) and len(value) == len(arguments)
        return whole and all(map(_is_of, value, arguments))
    return True  # of another kind: whoever made it has checked it


def _shown(value: Any) -> str:
    """A value for a message, cut short."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, keys in order, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def strip_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where it once lay: a path of the machine that saved it."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}
