"""Writes pipeline folders in diffusers' layout."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tlcm_jax.io import names
from tlcm_jax.io.files import cast, save_tensors
from tlcm_jax.io.json_files import strip_local_paths, write_json
from tlcm_jax.io.pipeline_index import INDEX_FILE, OPTIONAL, read_index
from tlcm_jax.io.tensors import weights_stem

# What a component may consist of besides the weights written here. Anything else, pickles above
# all, is left behind.
_DATA = (".json", ".txt", ".model", ".safetensors")


def write_component(
    folder: Path, config: Mapping[str, Any], params: Mapping[str, Any], dtype: str = "fp32"
) -> None:
    """Writes one network: `config.json` and its weights in safetensors.

    Args:
      folder: the component's folder; made if it is missing.
      config: the component's JSON, as the pipeline folder held it.
      params: Flax tree; host or device arrays.
      dtype: one of `files.DTYPES`.

    Raises:
      ValueError: a weight does not fit in the dtype, or is not finite.
      OSError: the folder cannot be written.
    """
    write_json(folder / "config.json", strip_local_paths(config))
    tensors = {
        name: cast(f"{folder.name} {name}", value, dtype)
        for name, value in names.to_torch(jax.tree.map(np.asarray, params)).items()
    }
    save_tensors(folder / f"{weights_stem(config)}.safetensors", tensors)


def write_pipeline(
    folder: Path,
    source: Path,
    components: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]],
    *,
    kind: str,
    scheduler: Mapping[str, Any],
    dtype: str = "fp32",
) -> None:
    """Writes a pipeline folder in diffusers' layout.

    Args:
      folder: where; made if it is missing.
      source: the folder whose other components (tokenizers) are copied.
      components: config and Flax tree of every network, by name; None for the tree writes the
        config alone.
      kind: class of the pipeline.
      scheduler: its scheduler's config, with `_class_name`.
      dtype: of all weights, one of `files.DTYPES`.

    Raises:
      FileNotFoundError: a component that is copied is missing, or pickled.
      ValueError: a weight does not fit in the dtype.
      OSError: the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    found = read_index(source)
    index = dict(found.content, _class_name=kind)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    check_components(source)
    for name in found.components.keys() - components.keys() - {"scheduler"}:
        files = _data(source / name)
        for path in files:
            (folder / name).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name / path.name)
        if not files:
            index[name] = [None, None]
            if name == "safety_checker":
                index["requires_safety_checker"] = False
    for name, (config, params) in components.items():
        if params is None:
            write_json(folder / name / "config.json", strip_local_paths(config))
        else:
            write_component(folder / name, config, params, dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / INDEX_FILE, strip_local_paths(index))


def check_components(folder: Path) -> None:
    """Raises a FileNotFoundError if a pipeline folder lacks something that an export copies."""
    for name in read_index(folder).components.keys() - OPTIONAL:
        if not _data(folder / name):
            raise FileNotFoundError(f"{folder / name} is missing or pickled; the export needs it")


def _data(component: Path) -> list[Path]:
    """A component's files that hold data; none if its weights are pickled."""
    files = [path for path in sorted(component.glob("*")) if path.is_file()]
    data = [path for path in files if path.suffix in _DATA]
    for path in data:
        _check_inside(path, component.parent)
    weights = any(path.suffix == ".safetensors" for path in data)
    pickled = any(path.suffix in (".bin", ".pt", ".ckpt") for path in files)
    return [] if pickled and not weights else data


def _check_inside(path: Path, model: Path) -> None:
    """Refuses links out of a model's folder: what they point at is copied, and then published.

    The hub's cache keeps its files as links to `blobs`, beside the folder of its snapshots.
    """
    folders = [model.resolve()]
    if model.resolve().parent.name == "snapshots":
        folders.append(model.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(folder) for folder in folders):
        raise ValueError(
            f"{path} is a link to outside the model's folder; put the file itself there"
        )
