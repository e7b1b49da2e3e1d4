"""Several LoRAs at once, each with its weight: what `--lora` means."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.interchange.lora_files import read_lora
from tlcm_jax.models.adapters import combined


def read_loras(specs: Sequence[str], unet: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads several LoRAs, each with its weight, as one adapter.

    Args:
      specs: `PATH` or `PATH:WEIGHT`, such as `style.safetensors:0.8`.
      unet: as in `read_lora`.

    Raises:
      FileNotFoundError, ValueError: as `read_lora`.
    """
    paths, weights = zip(*(_split_weight(spec) for spec in specs), strict=True)
    return combined([read_lora(path, unet) for path in paths], weights)


def _split_weight(spec: str) -> tuple[str, float]:
    """`PATH` and its weight; a path that exists as it stands has weight 1."""
    path, colon, weight = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return spec, 1.0
