"""Pairs that were drawn once, in files, to be trained on many times.

A folder, on disk or `gs://`, holds

    pairs.json      what the pairs were drawn with, how many refills there are, and their arrays
    FIELD/          a field of all refills as a Zarr array (TensorStore), `[refills, rows, ...]`,
                    of which a chunk holds the pairs of one prompt
    done/000012     empty: refill 12 is whole

so refills are written by any number of hosts in any order, and read by index. Latents are kept in
bfloat16, or in float32, which loses nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Int

_INDEX, _DONE = "pairs.json", "done/"
DTYPES = ("bfloat16", "float32")


class PairStore:
    """The pairs of a folder.

    Attributes:
      described: what they were drawn with, plain nested values.
      refills: how many there are, or are to be.
      rows: pairs of a refill.
    """

    def __init__(self, folder: str):
        """Opens what `create` made.

        Raises:
          FileNotFoundError: there are no pairs.
          ValueError: the index is damaged, or a bucket cannot be read.
        """
        self._folder, self._files = folder, _Files(folder)
        text = self._files.read(_INDEX)
        if text is None:
            raise FileNotFoundError(
                f"{folder} holds no pairs ({_INDEX}): draw them with python -m "
                "tlcm_jax.teacher_paths"
            )
        try:
            index = json.loads(text)
            self.described: Mapping[str, Any] = index["described"]
            self.refills, self.rows = int(index["refills"]), int(index["rows"])
            self._kinds = {name: np.dtype(kind) for name, kind in index["fields"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder}/{_INDEX} is damaged ({error}): draw the pairs again"
            ) from None
        self._arrays = {name: self._files.array(name, open=True) for name in self._kinds}

    @classmethod
    def create(
        cls,
        folder: str,
        described: Mapping[str, Any],
        *,
        refills: int,
        fields: Mapping[str, Any],
        chunk: int,
        dtype: str | None = "bfloat16",
    ) -> "PairStore":
        """Opens the pairs of a folder, which is made if it is not there.

        Args:
          folder: where.
          described: what they are drawn with.
          refills: how many there are to be.
          fields: by name an array's shape and dtype, of one refill: `[rows, ...]`.
          chunk: rows of a chunk; divides the rows of each host.
          dtype: that floating-point fields are kept in, one of `DTYPES`; None keeps theirs.

        Raises:
          ValueError: the folder holds pairs that were drawn otherwise, or cannot be written.
        """
        if dtype not in (*DTYPES, None):
            raise ValueError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
        index = {
            "described": described,
            "refills": refills,
            "rows": next(iter(fields.values())).shape[0],
            "kept_in": dtype,
            "fields": {name: np.dtype(field.dtype).name for name, field in fields.items()},
        }
        index = json.loads(json.dumps(index))
        files = _Files(folder)
        text = files.read(_INDEX)
        if text is None:
            for name, field in fields.items():
                floats = dtype is not None and jnp.issubdtype(field.dtype, jnp.floating)
                files.array(
                    name,
                    metadata={
                        "shape": [refills, *field.shape],
                        "chunks": [1, chunk, *field.shape[1:]],
                    },
                    dtype=str(dtype) if floats else np.dtype(field.dtype).name,
                    create=True,
                    delete_existing=True,
                )
            files.write(_INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
            return cls(folder)
        known = json.loads(text)
        if known != index:
            changed = ", ".join(sorted(key for key in index if known.get(key) != index[key]))
            raise ValueError(
                f"{folder} holds pairs of another recipe (other {changed}): give another folder, "
                "or remove it"
            )
        return cls(folder)

    @property
    def done(self) -> frozenset[int]:
        """Refills that are whole."""
        return frozenset(int(name) for name in self._files.names(_DONE))

    def check_whole(self) -> None:
        """Raises a ValueError unless every refill is there."""
        found = len(self.done)
        if found < self.refills:
            raise ValueError(
                f"{self._folder} holds {found} of {self.refills} refills: run the command that "
                "draws them again, it goes on with the others"
            )

    def write(self, refill: int, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes rows from `first` on; returns when they are there."""
        writes = []
        for name, array in arrays.items():
            into = self._arrays[name]
            rows = into[refill, first : first + len(array)]
            writes.append(rows.write(np.asarray(array).astype(into.dtype.numpy_dtype)))
        for write in writes:
            write.result()

    def mark(self, refill: int) -> None:
        """Says that all rows of a refill are written."""
        self._files.write(f"{_DONE}{refill:06d}", "")

    def gather(self, indices: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Single rows, numbered through all refills, by field."""
        places = np.divmod(indices, self.rows)
        reads = {name: array.vindex[places].read() for name, array in self._arrays.items()}
        return {name: read.result().astype(self._kinds[name]) for name, read in reads.items()}

    def read(self, refill: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Rows of a refill by field, in the dtypes that they were drawn in."""
        reads = {name: array[refill, rows].read() for name, array in self._arrays.items()}
        return {name: read.result().astype(self._kinds[name]) for name, read in reads.items()}


class _Files:
    """A folder's files and arrays, on disk or in a bucket, each written whole or not at all."""

    def __init__(self, folder: str):
        self._folder = folder
        self._spec = _spec(folder)
        self._store = self._told(lambda: ts.KvStore.open(self._spec).result())

    def read(self, name: str) -> str | None:
        found = self._told(lambda: self._store.read(name).result())
        return found.value.decode() if found.state == "value" else None

    def write(self, name: str, text: str) -> None:
        self._told(lambda: self._store.write(name, text.encode()).result())

    def names(self, folder: str) -> Sequence[str]:
        """What lies in a folder of it, `folder` ending with a slash."""
        within = ts.KvStore.KeyRange(folder, folder[:-1] + chr(ord(folder[-1]) + 1))
        found = self._told(lambda: self._store.list(within).result())
        return [key.decode().removeprefix(folder) for key in found]

    def array(self, name: str, **options: Any) -> Any:
        """A Zarr array in a folder of that name, opened or made as the options say."""
        store = {**self._spec, "path": f"{self._spec['path']}{name}/"}
        spec = {"driver": "zarr", "kvstore": store, **options}
        return self._told(lambda: ts.open(spec).result())

    def _told(self, call: Any) -> Any:
        try:
            return call()
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            hint = ""
            if self._folder.startswith("gs://"):
                hint = "; log in (gcloud auth application-default login), or ask for the rights"
            raise ValueError(f"cannot use the pairs in {self._folder}: {reason}{hint}") from None


def _spec(folder: str) -> dict[str, Any]:
    """TensorStore's name for a folder."""
    if folder.startswith("gs://"):
        bucket, _, path = folder.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path.rstrip('/')}/" if path else ""}
    return {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
