"""Reading safetensors, one tensor at a time; pickled weights are refused.

bf16 and fp16 files are handed over in the dtype asked for; nothing else is computed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class TensorFile(Mapping[str, np.ndarray]):
    """A lazy, read-only mapping over one or several safetensors files.

    Attributes:
      metadata: the text in the files' headers.
    """

    def __init__(self, files: list[Path]):
        """Opens the files.

        Raises:
          ValueError: a file is not a whole safetensors file; it is named.
        """
        self._where = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is not a readable safetensors file ({error}); fetch it again"
                ) from None
            self._where.update({name: handle for name in handle.keys()})
            self.metadata.update(handle.metadata() or {})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def refuse_pickle(path: Path) -> None:
    """Raises a ValueError, with the command that converts it, if `path` is a pickled checkpoint."""
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read. Convert it where you trust "
            "it: python -c \"import torch, safetensors.torch as s; t = torch.load('"
            f"{path.name}', weights_only=True); s.save_file(t.get('state_dict', t), "
            f"'{path.stem}.safetensors')\""
        )


def open_component(folder: Path, stem: str) -> TensorFile:
    """The weights of one pipeline component, single or sharded.

    Args:
      folder: e.g. `model/unet`.
      stem: `diffusion_pytorch_model` or `model`.

    Raises:
      ValueError: there are only pickled weights, or a shard is missing or broken.
      FileNotFoundError: there are no weights.
    """
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return TensorFile([single])
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return TensorFile([folder / shard for shard in _shards(index)])
    for other in sorted(folder.glob("*")) if folder.is_dir() else ():
        refuse_pickle(other)
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors; the model folder is not whole")


def _shards(index: Path) -> list[str]:
    """The files that an index names; each must lie beside it."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("its weight_map must name files in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error}); fetch it again") from None
    return shards
