"""Prompt files: text with one prompt a line, tables with a column of them, plain or gzipped.

| file | prompts |
|---|---|
| `.csv`, `.tsv`, `.jsonl` (or `.ndjson`) | a column: `FILE:COLUMN`; by default `prompt`, else `caption`, else `text` |
| any other | one a line; blank lines and lines that begin with `#` do not count |

`.gz` may stand behind either. What is no text of prompts is refused: it would be trained on.
"""  # noqa: E501

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from tlcm_jax.io import buckets

DEFAULT_COLUMNS = ("prompt", "caption", "text")
_JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", *_JSON_LINES)

# How files begin that are no text, though some of them could pass for it.
_FORMS = {
    b"PAR1": "a parquet file; write its caption column as text, CSV or JSONL",
    b"PK\x03\x04": "a zip archive (or an Excel or Word file); give the text in it",
    b"%PDF": "a PDF; save its text",
    b"{\\rtf": "rich text; save it as plain text",
    b"SQLite format 3": "a database; write its caption column as text, CSV or JSONL",
    b"BZh": "packed by bzip2; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"ARROW1": "an Arrow file; write its caption column as text, CSV or JSONL",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull`",
}
_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_LARGEST = 200 << 20


def split_column(path: str | os.PathLike) -> tuple[Path, str | None]:
    """A path, and the column named after its colon, if it is a table that one may be named of.

    A file in a bucket is fetched (`io.buckets`, whose errors these are).
    """
    text = os.fspath(path)
    stem, colon, column = text.rpartition(":")
    if colon and _kind(Path(stem)) in TABLES and not Path(text).exists():
        return buckets.local(stem), column
    return buckets.local(text), None


def is_table(path: Path) -> bool:
    """Whether a file is read by columns."""
    return _kind(path) in TABLES


def read_lines(path: Path) -> list[str]:
    """The prompts of a text file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no text of prompts, or holds none.
    """
    text = _read_text(path)
    lines = [line.strip() for line in text.split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(
            f"prompt file {path} has no prompt: write one a line (blank lines and "
            f"lines that begin with # do not count)"
        )
    if all(_is_json(line) for line in prompts):
        raise ValueError(
            f"prompt file {path} holds JSON, one value a line: name it .jsonl, and the column as "
            f"{path.with_suffix('.jsonl')}:COLUMN; take the quotes off texts"
        )
    if text.lstrip()[:1] in "[{" and _is_json(text):
        raise ValueError(
            f"prompt file {path} is one JSON value: write one prompt a line, or JSON objects one "
            "a line as .jsonl"
        )
    return prompts


def read_column(path: Path, column: str | None = None) -> list[str]:
    """The texts of a table's column; rows without one, or with an empty one, are left out.

    Args:
      path: a `.csv` or `.tsv` with a header, or JSON objects one a line.
      column: by default the first of `DEFAULT_COLUMNS` that there is.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such table, has no such column or no text in it.
    """
    kind, text = _kind(path), _read_text(path)
    try:
        rows = _json_rows(text) if kind in _JSON_LINES else _table_rows(text, kind)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"prompt file {path} is no {kind[1:]} file ({error})") from None
    known = dict.fromkeys(key for row in rows for key in row)
    if column is None:
        named = {key.lower(): key for key in reversed(known)}
        column = next((named[name] for name in DEFAULT_COLUMNS if name in named), None)
    if column not in known:
        there = ", ".join(map(str, list(known)[:20])) or "none"
        wanted = " or ".join(DEFAULT_COLUMNS) if column is None else repr(column)
        raise ValueError(
            f"prompt file {path} has no column {wanted} (it has {there}); name the column, "
            f"{path}:COLUMN"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str | None):
            raise ValueError(f"prompt file {path}: row {number} has no text under {column!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in row.get(column) or ""):
            raise ValueError(f"prompt file {path}: row {number} holds half a surrogate pair")
    prompts = [joined for row in rows if (joined := " ".join((row.get(column) or "").split()))]
    if not prompts:
        raise ValueError(f"prompt file {path} has no prompt in its column {column!r}")
    return prompts


def _kind(path: Path) -> str:
    """A file's suffix, that of what is packed in it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_text(path: Path) -> str:
    """A file's text, its lines ended by line feeds; whatever is no text is refused.

    Only line feeds and carriage returns separate: `str.splitlines` would also cut at characters
    that a prompt may hold.
    """
    data = _read_bytes(path)
    for start, form in _FORMS.items():
        if data.startswith(start):
            raise ValueError(f"prompt file {path} is {form}")
    if _PAGE.match(data):
        raise ValueError(f"prompt file {path} is a web page or XML, not prompts; fetch it again")
    body = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(body)
        line = data.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"prompt file {path} is not UTF-8: line {line}, byte {offset} of the file "
            f"is 0x{data[offset]:02x}; save it as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        hint = "UTF-16 without its mark? save it as UTF-8" if "\0" in text else "it is no text"
        raise ValueError(
            f"prompt file {path} holds the control character 0x{ord(found[0]):02x} in line "
            f"{line} ({hint})"
        )
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"prompt file {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"prompt file {path} is a folder: name a text file") from None
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as unpacked:
            data = unpacked.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"prompt file {path} is a damaged gzip file ({error})") from None
    if len(data) > _LARGEST:
        raise ValueError(f"prompt file {path} unpacks to over {_LARGEST >> 20} MB: unpack it first")
    return data


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object, list or string, as against words, which a number is too."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return False
    try:
        return isinstance(json.loads(text), dict | list | str)
    except (ValueError, RecursionError):
        return False


def _json_rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    return rows


def _table_rows(text: str, kind: str) -> list[dict[str, Any]]:
    header = text.lstrip("\n").partition("\n")[0]
    delimiter = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text.lstrip("\n"), newline=""), delimiter=delimiter)
    return [{key.strip(): value for key, value in row.items() if key} for row in reader]
