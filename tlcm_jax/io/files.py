"""Writing files and folders whole or not at all, and tensors in the dtype asked for."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

DTYPES: Mapping[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor, contiguous, in one of `DTYPES`.

    Raises:
      ValueError: the dtype is not one of them, or a value does not fit in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    value = np.asarray(value)
    with np.errstate(over="ignore"):
        result = np.asarray(value.astype(DTYPES[dtype]), order="C")
    if not np.all(np.isfinite(result)):
        if np.all(np.isfinite(value.astype(np.float32))):
            raise ValueError(
                f"{name} holds values up to {np.abs(value).max():.3g}, which {dtype} cannot; "
                "write bf16 or fp32"
            )
        raise ValueError(f"{name} holds values that are not finite; nothing was written")
    return result


def save_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file that PyTorch programs read; equal tensors make equal bytes.

    Raises:
      OSError: it cannot be written; a full disk has `errno.ENOSPC`.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
        _sort_header(path)
    except SafetensorError as error:  # the library reports the system's error as text
        full = "No space left" in str(error) or "quota exceeded" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    # The library writes as its owner's private file; give it the mode of any other file.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sort_header(path: Path) -> None:
    """Puts the header's keys in order, which the library writes as its hash map has them."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        ordered = text.encode().ljust(size)
        if len(ordered) != size:
            raise ValueError(f"{path}: its header cannot be put in order")
        file.seek(8)
        file.write(ordered)


@contextlib.contextmanager
def atomic_write(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling to write, a file or a folder; it becomes `target` when all went well.

    Nothing half written is ever seen under the target's name, and what stood there before stays
    until the new one is whole.

    Args:
      target: the file or folder to be.
      replace: whether an existing folder may be replaced. Files always are.

    Yields:
      A path that does not exist, in the target's (existing) parent folder.

    Raises:
      FileExistsError: the target is a folder with something in it, and `replace` is not given.
      OSError: writing failed; the message names the target and says what to do.
    """
    if target.is_dir() and any(target.iterdir()) and not replace:
        raise FileExistsError(f"{target} already holds files; give another folder, or empty it")
    part = target.with_name(f".{target.name}.part")
    old = target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of a run that was killed
        yield part
        if target.is_dir():  # a folder cannot be renamed over another
            _remove(old)
            os.replace(target, old)
        sync(part)
        os.replace(part, target)
        sync(target.parent, deep=False)
        _remove(old)
    except OSError as error:
        _remove(part)
        if error.errno is None:  # raised on purpose, with a message of its own
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no space left on the device for {target}; nothing was left behind: free some "
                "space, or write elsewhere",
            ) from error
        raise OSError(error.errno, f"cannot write {target}: {error}") from error
    except BaseException:
        _remove(part)
        raise


def sync(path: Path, deep: bool = True) -> None:
    """Returns when a file, or a folder with all in it, is on the disk and not only in memory.

    Args:
      path: the file or folder.
      deep: False writes of a folder its list of names alone.
    """
    inside = path.rglob("*") if deep and path.is_dir() else ()
    for each in (*inside, path):
        if each.is_symlink():
            continue
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # File systems that keep no order of their own (some mounts of buckets) have no fsync.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS):
                raise
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
