"""An autoencoder that lies elsewhere than its model: what `--vae` names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tlcm_jax.io import buckets, names
from tlcm_jax.io.checkpoint_kinds import describe_keys
from tlcm_jax.io.hub import HubId, fetch_files
from tlcm_jax.io.ldm_names import PREFIXES, places
from tlcm_jax.io.places import PlacedTensors
from tlcm_jax.io.sources import ComponentFiles
from tlcm_jax.io.tensors import STEMS, TensorFile, Tensors, open_component, refuse_pickle

_PREFIX = PREFIXES["sdxl"]["vae"]


class VaeFiles(ComponentFiles):
    """An autoencoder's files."""

    def __init__(self, tensors: Tensors, config: Path | None = None):
        """As `open` calls it."""
        self.tensors = tensors
        self.config = config

    @classmethod
    def open(cls, path: str | Path) -> "VaeFiles":
        """Opens an autoencoder.

        Args:
          path: a folder with its `config.json`, or a pipeline's, or the hub id of either; or a
            safetensors file, by diffusers' names or by single-file checkpoints', whole ones too.

        Raises:
          FileNotFoundError: there is no such thing.
          ValueError: it holds no autoencoder.
        """
        local = buckets.local(path)
        if local.is_file():
            refuse_pickle(local)
            tensors = TensorFile([local])
            if not any(re.match(rf"({re.escape(_PREFIX)})?decoder\.", key) for key in tensors):
                kind = describe_keys(tensors) or "no file with an autoencoder in it"
                raise ValueError(f"--vae {path} is {kind}; give an autoencoder")
            return cls(tensors)
        if not local.is_dir():
            hub_id = HubId.parse(path)
            if hub_id is None:
                raise FileNotFoundError(f"--vae {path}: there is no such file, folder or hub id")
            local = fetch_files(hub_id, _needed)
        folder = local / "vae" if (local / "vae").is_dir() else local
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--vae {path} holds no config.json of an autoencoder")
        return cls(open_component(folder, STEMS[0]), folder / "config.json")

    def component(self, shapes: Mapping) -> Tensors:
        """See `sources.ComponentFiles`."""
        if any(re.match(r"(encoder|decoder)\.(down|up|mid)_block", key) for key in self.tensors):
            return self.tensors
        found = places("vae", names.to_torch_names(shapes), "sdxl")
        if not any(key.startswith(_PREFIX) for key in self.tensors):
            found = {
                name: dataclasses.replace(place, key=place.key.removeprefix(_PREFIX))
                for name, place in found.items()
            }
        return PlacedTensors(self.tensors, found)


def _needed(listed: Sequence[str]) -> list[str]:
    """Which of a repository's files are its autoencoder's."""
    inner = "vae/" if "vae/config.json" in listed else ""
    files = (f"{inner}{STEMS[0]}.safetensors", f"{inner}{STEMS[0]}.fp16.safetensors")
    weights = next((name for name in files if name in listed), None)
    if f"{inner}config.json" not in listed or weights is None:
        raise FileNotFoundError("that repository holds no autoencoder's config.json and weights")
    return [f"{inner}config.json", weights]
