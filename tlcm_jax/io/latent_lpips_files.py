"""A latent LPIPS in a folder: ours, or the published E-LatentLPIPS.

Ours is `config.json` and safetensors under the module's own names; the published one a checkpoint
of the package `elatentlpips`, converted once (`python -m tlcm_jax.io.convert_weights
sdxl_latest_vgg16_tuned.pth`).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tlcm_jax.io.json_files import parse, read_object
from tlcm_jax.io.places import Place, PlacedTensors
from tlcm_jax.io.scorer_files import read_own, read_params
from tlcm_jax.io.tensors import TensorFile, refuse_pickle
from tlcm_jax.models.latent_lpips import DEPTHS, ELatentLPIPS, LatentLPIPS

CONFIG, WEIGHTS = "config.json", "latent_lpips.safetensors"
# What the published files are called, after the name of the autoencoder.
_TUNED = "_latest_vgg16_tuned"


def is_latent_lpips(folder: str | Path) -> bool:
    """Whether a folder holds one."""
    folder = Path(folder)
    return _published(folder) is not None or all((folder / f).is_file() for f in (CONFIG, WEIGHTS))


def _published(folder: Path) -> Path | None:
    """The file of the published network in a folder, if there is one."""
    return next(iter(sorted(folder.glob(f"*{_TUNED}.safetensors"))), None)


def save_latent_lpips(
    folder: str | Path, network: LatentLPIPS, params: Any, channels: int, scores: dict[str, float]
) -> None:
    """Writes weights (fp16) and what is known of them.

    Args:
      folder: made if it is missing.
      network: the module.
      params: its parameters.
      channels: of the latents.
      scores: how well it agrees with pixel LPIPS.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, np.float16))
        for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
    }
    save_file(tensors, folder / WEIGHTS)
    config = {"widths": list(network.widths), "channels": channels, "scores": scores}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_latent_lpips(folder: str | Path) -> tuple[LatentLPIPS | ELatentLPIPS, Any]:
    """Reads what `save_latent_lpips` wrote, or the published network.

    Returns:
      The module and its parameters, float32, on the host.

    Raises:
      FileNotFoundError: the folder lacks one of the two files.
      ValueError: a file is damaged, or the two do not belong together.
    """
    folder = Path(folder)
    if not is_latent_lpips(folder):
        for file in sorted(folder.glob(f"*{_TUNED}.*")):
            refuse_pickle(file)
        raise FileNotFoundError(
            f"{folder} holds no latent LPIPS: neither {CONFIG} and {WEIGHTS}, nor "
            f"sdxl{_TUNED}.safetensors (Mingguksky/elatentlpips)"
        )
    if (published := _published(folder)) is not None:
        return _load_published(published)
    try:
        sizes = parse(folder / CONFIG, read_object(folder / CONFIG), _Sizes.from_dict)
        tensors = TensorFile([folder / WEIGHTS])
    except ValueError as error:
        raise ValueError(f"{folder}: a file of the latent LPIPS is damaged ({error})") from None
    network = LatentLPIPS(sizes.widths)
    latents = jax.ShapeDtypeStruct((1, 4, 4, sizes.channels), jnp.float32)
    return network, read_own(tensors, network, (latents, latents), str(folder / WEIGHTS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What `config.json` says of a latent LPIPS."""

    widths: tuple[int, ...]
    channels: int

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "_Sizes":
        if len(raw["widths"]) > 16:
            raise ValueError(f"widths holds {len(raw['widths'])} values, over 16")
        return cls(widths=tuple(raw["widths"]), channels=raw["channels"])


def _load_published(file: Path) -> tuple[ELatentLPIPS, Any]:
    """The network of the package `elatentlpips`, whose file says its sizes."""
    tensors = TensorFile([file])
    # The heads are stored twice, and each norm counts its batches.
    kept = [k for k in tensors if not k.startswith("lins.") and "num_batches_tracked" not in k]
    first = [0]
    for depth in DEPTHS[:-1]:
        first.append(first[-1] + 3 * depth + 1)
    try:
        if any(tensors[f"net.slice{i + 1}.{n}.weight"].ndim != 4 for i, n in enumerate(first)):
            raise KeyError("convolutions")
        stages = [tensors[f"net.slice{i + 1}.{layer}.weight"] for i, layer in enumerate(first)]
    except KeyError as error:
        raise ValueError(f"{file} holds no E-LatentLPIPS: it has no {error.args[0]}") from None
    network = ELatentLPIPS(tuple(len(weight) for weight in stages))
    latents = jax.ShapeDtypeStruct((1, 8, 8, stages[0].shape[1]), jnp.float32)
    placed = PlacedTensors(tensors, {key: Place(key) for key in kept})
    return network, read_params(placed, network, (latents, latents), str(file))
