"""Several LoRAs at once, each with its weight: what `--lora` means."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.lora_files import LoraNames, read_networks
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import concat_loras


def apply_loras(
    model: LatentModel, specs: Sequence[str]
) -> tuple[LatentModel, Mapping[str, Any] | None]:
    """Reads LoRAs for a model.

    Args:
      model: what they belong to.
      specs: as of `read_loras`.

    Returns:
      The model, its text encoders' weights changed as the LoRAs say; and the backbone's adapter,
      None where they adapt text encoders alone.

    Raises:
      FileNotFoundError, ValueError: as `read_networks`.
    """
    networks = {name: tree for name, tree in model.params.items() if name != model.decoder}
    adapters = read_loras(specs, networks, model.lora_names)
    merged = {
        name: lora.merge(networks[name], adapter)
        for name, adapter in adapters.items()
        if name != model.backbone
    }
    return model.with_params(**merged), adapters.get(model.backbone)


def read_loras(
    specs: Sequence[str], networks: Mapping[str, Any], naming: LoraNames
) -> dict[str, Mapping[str, Any]]:
    """Reads several LoRAs, each with its weight, as one adapter a network.

    Args:
      specs: `PATH` or `PATH:WEIGHT`, such as `style.safetensors:0.8`.
      networks: as in `read_networks`.
      naming: the family's.

    Returns:
      By network, as far as one of the LoRAs adapts it.

    Raises:
      FileNotFoundError, ValueError: as `read_networks`.
    """
    found: dict[str, list] = {}
    for path, weight in map(_split_weight, specs):
        for network, adapter in read_networks(path, networks, naming).items():
            found.setdefault(network, []).append((adapter, weight))
    return {network: concat_loras(*zip(*pairs, strict=True)) for network, pairs in found.items()}


def _split_weight(spec: str) -> tuple[str, float]:
    """`PATH` and its weight; a path that exists as it stands has weight 1."""
    path, colon, weight = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        factor = float(weight)
    except ValueError:
        return spec, 1.0
    if not abs(factor) < 1e6:
        raise ValueError(f"--lora {spec}: its weight must be a number of some reasonable size")
    return path, factor
