"""Arrays of numpy's files, `.npz` and `.npy`: sizes are checked before anything is allocated.

An array's header says its shape, and numpy takes that much memory before it reads; a deflated
member may say a thousand times what the file holds. Nothing pickled is read.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

# How much memory arrays may take, beside what the file itself takes twice.
_BESIDE = 200 * 2**20
# Text is kept at four bytes a letter, and as long as the longest: its files are packed well.
_TEXT = 2 * 2**30
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path: str | os.PathLike, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of a `.npz`.

    Args:
      path: the file.
      names: of the arrays; all of them by default.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no `.npz`, an array is missing, holds objects, or says another size than it
        has, or one that its file cannot hold.
    """
    path = Path(path)
    size = _size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if names is None:
                names = [name.removesuffix(".npy") for name in members]
            return {name: _member(archive, members, name, size) for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError,
            ValueError, KeyError, IndexError, OverflowError, UnicodeError) as error:  # fmt: skip
        raise ValueError(f"{path} is no .npz file that can be read ({_line(error)})") from None


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """Reads a `.npy`; errors as `read_npz`'s."""
    path = Path(path)
    size = _size(path)
    try:
        with path.open("rb") as stream:
            return _array(stream, size, _BESIDE + 2 * size, path.name)
    except (EOFError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no .npy file that can be read ({_line(error)})") from None


def _size(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return path.stat().st_size


def _member(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, size: int
) -> np.ndarray:
    info = members.get(f"{name}.npy")
    if info is None:
        raise ValueError(f"it has no array {name!r}")
    with archive.open(info) as stream:
        return _array(stream, info.file_size, _BESIDE + 2 * size, name)


def _array(stream: IO[bytes], size: int, limit: int, name: str) -> np.ndarray:
    """An array of `size` bytes with its header."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"{name} is of numpy's format {version}")
    try:
        shape, fortran, dtype = _HEADERS[version](stream)
    except Exception as error:  # of whatever kind: it is read as a piece of Python
        raise ValueError(f"the header of {name} is damaged ({_line(error)})") from None
    if dtype.hasobject or dtype.fields is not None:
        raise ValueError(f"{name} holds objects, which are pickles")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name} has a shape {shape}")
    count = math.prod(shape)
    # Before its bytes are counted the header has passed: at most `size` are left.
    needed = count * dtype.itemsize
    if needed > size or needed > (max(limit, _TEXT) if dtype.kind in "US" else limit):
        raise ValueError(f"{name} says {needed} bytes, which the file cannot hold")
    data = bytearray()
    while len(data) < needed:
        piece = stream.read(min(needed - len(data), 1 << 24))
        if not piece:
            raise ValueError(f"{name} is cut short")
        data += piece
    array = np.frombuffer(data, dtype, count)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
