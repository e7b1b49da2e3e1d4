"""Damaged files: random changes of bytes, and changes that keep a format's frame.

Every change is a pure function of a generator of random numbers, so that a case is repeated by its
number.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

# Values that a field may be given.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e-300, 1e308, -1e308, 255, 65_535, 10**6, 10**7, 10**9,
    2**31, 2**53, 2**63, 2**64, 10**30, "", "x", "None", "1", "1e9", "../../escape", "/etc/passwd",
    "..", "a/b", "a\\b", "a\0b", "\ud800", "\u202e", "x" * 10_000, "${HOME}", "~", "<script>", [],
    {}, [[]], [None], [0], [1, 2], ["a"], {"a": 1}, {"__class__": "x"}, [1] * 20, [64] * 200,
)  # fmt: skip
KEYS = ("../../escape", "/tmp/x", "", "\0", "..", ".", "unet", "scheduler", "__metadata__", "a.b")
# Texts in place of a value, which no Python value is written as.
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 2000, "[" * 70
    + "]" * 70, "'x'", "tru", "0x10", "1" + "0" * 400, '"\\ud800"', '"\\u0000"',
)  # fmt: skip


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flipped bits, cuts, runs of one byte, doubled or foreign pieces."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = len(changed)
        at = rng.randrange(size) if size else 0
        length = min(size - at, rng.choice((1, 2, 4, 8, 64, 512)))
        kind = rng.randrange(8)
        if kind == 0 and size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at : at + length] = bytes([rng.choice((0, 1, 127, 128, 255))]) * length
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 5:
            del changed[at : at + length]
        elif kind == 6:
            changed += rng.randbytes(rng.choice((1, 8, 100)))
        elif size >= 8:
            at = rng.randrange(size - 7)
            changed[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
    return bytes(changed)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Fields of another type, missing, twice, renamed, huge; or what is no JSON value at all."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = _change_value(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(12)
    if kind == 0:
        text = _with_raw(rng, value)
    elif kind == 1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    elif kind == 2:
        text = rng.choice(("", " ", "\ufeff", "//", "null", "[", "0")) + text
    elif kind == 3:
        text = text[: rng.randrange(len(text) + 1)]
    return text.encode("utf-8", "surrogatepass")


def _change_value(rng: random.Random, value: Any) -> Any:
    """A value with one place in it changed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        changed = list(value)
        kind = rng.randrange(4)
        if kind == 0:
            del changed[at]
        elif kind == 1:
            changed *= rng.choice((2, 30))
        else:
            changed[at] = _change_value(rng, changed[at])
        return changed
    key = rng.choice(list(value))
    changed = dict(value)
    kind = rng.randrange(10)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[rng.choice(KEYS)] = changed.pop(key)
    elif kind == 2:
        changed[rng.choice(KEYS)] = rng.choice(HOSTILE)
    elif isinstance(changed[key], dict | list) and rng.random() < 0.7:
        changed[key] = _change_value(rng, changed[key])
    elif isinstance(changed[key], int | float) and rng.random() < 0.4:
        changed[key] = rng.choice((-changed[key], changed[key] * 1000, changed[key] + 1, 0))
    else:
        changed[key] = rng.choice(HOSTILE)
    return changed


def _with_raw(rng: random.Random, value: Any) -> str:
    raw = rng.choice(RAW)
    if not isinstance(value, dict) or not value:
        return raw
    key = rng.choice(list(value))
    return json.dumps({**value, key: "@raw@"}).replace('"@raw@"', raw)


def change_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of lines, each JSON or text: one changed, doubled, cut, or of another kind."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        lines[at] = change_json(rng, lines[at])
    elif kind == 1:
        lines[at] = change_bytes(rng, lines[at])
    elif kind == 2:
        del lines[at]
    elif kind == 3:
        lines.insert(at, lines[at] * rng.choice((1, 100)))
    elif kind == 4:
        lines[at] = rng.choice(
            (b"\0", b"\xff\xfe", b"[]", b"{}", b"null", b"\r", b"\x1b[31m", b"1")
        )
    else:
        return change_bytes(rng, data)
    return b"\n".join(lines)


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A changed header over the same bytes; values that are not finite; or changed bytes."""
    kind = rng.randrange(5)
    size = int.from_bytes(data[:8], "little")
    if kind == 0 or size > len(data):
        return change_bytes(rng, data)
    body = bytearray(data[8 + size :])
    header = data[8 : 8 + size]
    if kind == 1:
        for _ in range(rng.choice((1, 4))):
            if len(body) >= 8:
                at = 4 * rng.randrange(len(body) // 4)
                body[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4))
    elif kind == 2:
        header = change_json(rng, header)
    else:
        header = _change_entry(rng, header)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**40, 2**63))
    return struct.pack("<Q", length % 2**64) + header + bytes(body)


def _change_entry(rng: random.Random, text: bytes) -> bytes:
    header = json.loads(text)
    name = rng.choice(list(header))
    entry = header[name]
    if name == "__metadata__" or not isinstance(entry, dict):
        header[name] = rng.choice(HOSTILE)
        return json.dumps(header).encode("utf-8", "surrogatepass")
    kind = rng.randrange(5)
    if kind == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x", 1)
        )
    elif kind == 1:
        shape = [*entry["shape"]] or [1]
        shape[rng.randrange(len(shape))] = rng.choice((0, -1, 1, 2**31, 2**62, 2**64, 1.5, "2"))
        entry["shape"] = rng.choice((shape, shape * 2, shape[::-1], [], [1] * 70 + shape))
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**40], [-4, 0], [4, 0], [0], 0, None))
    elif kind == 3:
        new = rng.choice((*KEYS, name.replace("weight", "bias"), name + ".x", name[1:], "v_pred"))
        header[new] = header.pop(name)
    else:
        del header[name]
    return json.dumps(header).encode("utf-8", "surrogatepass")


def change_npz(rng: random.Random, data: bytes) -> bytes:
    """Members with other headers, names or contents, deflated or not; or changed bytes."""
    if rng.random() < 0.4:
        return change_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    kind = rng.randrange(6)
    if kind == 0:
        members[rng.choice(("../../escape.npy", "/x.npy", "y.npy", "y"))] = members.pop(name)
    elif kind == 1:
        members[name] = change_bytes(rng, members[name])
    elif kind == 2:
        members[name] = members[name][: rng.randrange(len(members[name]))]
    else:
        members[name] = change_npy(rng, members[name])
    packed = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(packed, "w", method) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return packed.getvalue()


def change_npy(rng: random.Random, data: bytes) -> bytes:
    """An array with another header."""
    size = int.from_bytes(data[8:10], "little")
    body = data[10 + size :]
    header = repr(
        {
            "descr": rng.choice(
                ("<f4", "<f2", "<f8", "|O", "<U7", "<U2000000000", "<i8", "|V0", "|b1", "<M8[s]")
            ),
            "fortran_order": rng.choice((True, False)),
            "shape": rng.choice(
                ((1,), (), (0,), (10**12,), (2**62, 2), (-1,), (2, 4, 4, 4), (True,), (1.5,), "x")
            ),
        }
    )
    if rng.random() < 0.1:
        header = rng.choice(
            ("[" * 5000, "__import__('os').system('touch /tmp/x')", "{}", "x" * 100)
        )
    if rng.random() < 0.1:
        body = bytes(rng.choice((10**6, 4 * 10**6)))
    text = header.encode()[: 2**16 - 2] + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + body


CHANGES: dict[str, tuple[Change, ...]] = {
    "bytes": (change_bytes,),
    "json": (change_json, change_json, change_json, change_bytes),
    "lines": (change_lines, change_lines, change_bytes),
    "safetensors": (change_safetensors,),
    "npz": (change_npz,),
    "npy": (change_npy, change_bytes),
}


def changed(kind: str, rng: random.Random, data: bytes) -> bytes:
    """A damaged file of a kind, a key of `CHANGES`."""
    return rng.choice(CHANGES[kind])(rng, data)
