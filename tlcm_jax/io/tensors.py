"""Reading safetensors, one tensor at a time; pickled weights are refused.

Files are mapped, not read: a tensor is a view of the file until whoever places it copies what it
needs, once, in the dtype and the layout asked for.
"""

import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tlcm_jax.io.checkpoint_kinds import describe_bytes
from tlcm_jax.io.json_files import as_object, parse_json, read_object

# What the files of a component's weights are called: by diffusers, and by transformers.
STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Tensors that weights of few bits are to be multiplied by, and what such weights are.
_QUANTISED = {
    "scaled_fp8": "fp8 with scales", ".scale_weight": "fp8 with scales",
    ".weight_scale": "fp8 with scales", ".weight_scale_inv": "fp8 with scales",
    ".comfy_quant": "quantised with scales", ".SCB": "quantised by bitsandbytes",
    ".absmax": "quantised by bitsandbytes", ".quant_map": "quantised by bitsandbytes",
    ".qweight": "quantised by GPTQ or AWQ", ".svdq_scale": "quantised by SVDQuant",
}  # fmt: skip
_MAX_HEADER = 16 * 2**20  # bytes; of SDXL's single file a third of one MB
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class Tensors(Mapping[str, np.ndarray]):
    """Named tensors in files: views, which cost nothing until they are copied."""

    def label(self, name: str) -> str:
        """What the file itself calls a tensor, for messages."""
        return name

    def release(self) -> None:
        """Gives memory that earlier copies drew from the files back to the system."""


class TensorFile(Tensors):
    """A lazy, read-only mapping over one or several safetensors files, in the files' order.

    Attributes:
      metadata: the text in the files' headers.
    """

    def __init__(self, files: list[Path]):
        """Maps the files.

        Raises:
          ValueError: a file is not a whole safetensors file, or two hold the same tensor; they
            are named.
        """
        self._views: dict[str, np.ndarray] = {}
        self._maps: list[mmap.mmap] = []
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                header, start, mapped = _map(file)
                with safe_open(file, framework="numpy"):  # checks the whole header
                    pass
            except (SafetensorError, OSError, ValueError) as error:
                if file.is_file() and (kind := describe_bytes(file)):
                    raise ValueError(f"{file} is {kind}") from None
                raise ValueError(
                    f"{file} is not a readable safetensors file ({error}); fetch it again"
                ) from None
            self._maps.append(mapped)
            self.metadata.update(header.pop("__metadata__", None) or {})
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if name in self._views:
                    raise ValueError(f"{file} holds {name} once more than its sister files")
                if entry["dtype"] not in _DTYPES:
                    raise ValueError(f"{file}: {name} is of dtype {entry['dtype']}; convert it")
                dtype = np.dtype(_DTYPES[entry["dtype"]])
                offset = start + entry["data_offsets"][0]
                try:
                    self._views[name] = np.ndarray(entry["shape"], dtype, mapped, offset)
                except (ValueError, OverflowError, TypeError):  # more than numpy can count
                    raise ValueError(f"{file}: {name} has a shape that no tensor has") from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def release(self) -> None:
        """Drops the pages that were read from this process; views stay valid."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _map(file: Path) -> tuple[dict, int, mmap.mmap]:
    """A file's header, where its data begins, and its bytes."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > min(_MAX_HEADER, file.stat().st_size - 8):
            raise ValueError(f"its header is said to have {size} bytes")
        header = as_object(parse_json(stream.read(size).decode(), "its header"), "its header")
        return header, 8 + size, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def refuse_pickle(path: Path) -> None:
    """Raises a ValueError, with the command that converts it, if `path` is a pickled checkpoint."""
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read. Convert it: "
            f"python -m tlcm_jax.io.convert_weights {path}"
        )


def refuse_quantised(names: Collection[str], source: str) -> None:
    """Raises a ValueError that names a tensor without which the weights are not what they say."""
    for name in names:
        kind = next((kind for ending, kind in _QUANTISED.items() if name.endswith(ending)), None)
        if kind is not None:
            raise ValueError(
                f"{source}: its weights are {kind} ({name}), which is not supported; give the fp16 "
                "or bf16 file that it was made from"
            )


def weights_stem(config: Mapping[str, Any]) -> str:
    """One of `STEMS`: diffusers' configs name a class, and transformers' do not."""
    return STEMS[0 if "_class_name" in config else 1]


def weights_name(names: Collection[str], stem: str, variant: str | None = None) -> str | None:
    """Which of a component folder's files to open: its weights, or the index of its shards.

    Args:
      names: the folder's file names.
      stem: one of `STEMS`.
      variant: such as `fp16`; by default the files without one, else those of `fp16`.
    """
    for chosen in ("", ".fp16") if variant is None else (f".{variant}",):
        for name in (f"{stem}{chosen}.safetensors", f"{stem}.safetensors.index{chosen}.json"):
            if name in names:
                return name
    return None


def open_component(folder: Path, stem: str, variant: str | None = None) -> TensorFile:
    """The weights of one pipeline component, single or sharded.

    Args:
      folder: e.g. `model/unet`.
      stem: one of `STEMS`.
      variant: as in `weights_name`.

    Raises:
      ValueError: there are only pickled weights, or a shard is missing or broken.
      FileNotFoundError: there are no weights, or none of that variant.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file())
    # A config that names no class says nothing of its files' names either.
    named = (weights_name([path.name for path in files], each, variant) for each in (stem, *STEMS))
    name = next((found for found in named if found), None)
    if name is not None and name.endswith(".json"):
        return TensorFile([folder / shard for shard in shard_names(folder / name)])
    if name is not None:
        return TensorFile([folder / name])
    others = [path.name for path in files if path.suffix == ".safetensors"]
    if not others:
        for path in files:
            refuse_pickle(path)
    wanted = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
    there = f" (it has {', '.join(others)})" if others else ""
    raise FileNotFoundError(f"{folder} holds no {wanted}{there}; the model folder is not whole")


def shard_names(index: Path) -> list[str]:
    """The files that an index names; each must lie beside it.

    Raises:
      ValueError: it is no index, or names files elsewhere.
    """
    try:
        shards = sorted(set(read_object(index)["weight_map"].values()))
        if not shards or any(Path(shard).name != shard or "\0" in shard for shard in shards):
            raise ValueError("its weight_map must name files in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error}); fetch it again") from None
    return shards
