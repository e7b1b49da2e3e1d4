"""Several LoRAs at once, each with its weight: what `--lora` means.

Low-rank updates of the backbone stay an adapter. Those that are not of low rank, and all of text
encoders, are added to the weights: a weight w of a LoRA adds w times what it would change, of
DoRA's too (ComfyUI's convention; PEFT scales DoRA's inner update).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util

from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.lora_files import LoraFile, read_networks
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import concat_loras


def apply_loras(
    model: LatentModel, specs: Sequence[str]
) -> tuple[LatentModel, Mapping[str, Any] | None]:
    """Reads LoRAs for a model.

    Args:
      model: what they belong to.
      specs: `PATH` or `PATH:WEIGHT`, such as `style.safetensors:0.8`; a path as of
        `read_networks`.

    Returns:
      The model, its weights changed as far as the LoRAs are not of low rank, and its text encoders'
      in any case; and the backbone's adapter, None where there is no low-rank update of it.

    Raises:
      FileNotFoundError, ValueError: as `read_networks`.
    """
    networks = {name: tree for name, tree in model.params.items() if name != model.decoder}
    found = []
    for path, weight in map(split_weight, specs):
        found.append((read_networks(path, networks, model.lora_names), weight))
    adapters = combine(found)
    backbone = adapters.pop(model.backbone, None)
    changed = _with_dense(networks, found)
    for name, adapter in adapters.items():
        changed[name] = lora.merge(changed.get(name, networks[name]), adapter)
    return model.with_params(**changed), backbone


def merge_loras(model: LatentModel, specs: Sequence[str]) -> LatentModel:
    """A model with LoRAs in its weights, as if it had been trained so; arguments as above."""
    if not specs:
        return model
    model, adapter = apply_loras(model, specs)
    if adapter is None:
        return model
    backbone = lora.merge(model.params[model.backbone], adapter)
    return model.with_params(**{model.backbone: backbone})


def combine(files: Sequence[tuple[LoraFile, float]]) -> dict[str, Mapping[str, Any]]:
    """The low-rank updates of several files, each with its weight, as one adapter a network."""
    found: dict[str, list] = {}
    for file, weight in files:
        for network, adapter in file.adapters.items():
            found.setdefault(network, []).append((adapter, weight))
    return {network: concat_loras(*zip(*pairs, strict=True)) for network, pairs in found.items()}


def _with_dense(
    networks: Mapping[str, Any], files: Sequence[tuple[LoraFile, float]]
) -> dict[str, Any]:
    """The networks that updates of full rank change; each is that of the unchanged weights."""
    flat: dict[str, dict] = {}
    for file, weight in files:
        for (network, *layer), update in file.dense.items():
            original = flax.traverse_util.flatten_dict(networks[network])
            leaves = flat.setdefault(network, dict(original))
            path = (*layer, "kernel")
            change = weight * update.delta(original[path])
            leaves[path] = (leaves[path] + change).astype(original[path].dtype)
    return {network: flax.traverse_util.unflatten_dict(leaves) for network, leaves in flat.items()}


def split_weight(spec: str) -> tuple[str, float]:
    """`PATH` and its weight; a path that exists as it stands has weight 1."""
    path, colon, weight = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        factor = float(weight)
    except ValueError:
        return spec, 1.0
    if not abs(factor) < 1e6:
        raise ValueError(f"LoRA {spec}: its weight must be a number of some reasonable size")
    return path, factor
