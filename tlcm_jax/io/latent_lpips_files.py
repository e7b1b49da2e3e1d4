"""A latent LPIPS in a folder: `config.json` and safetensors under the module's own names."""

import json
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tlcm_jax.models.latent_lpips import LatentLPIPS

CONFIG, WEIGHTS = "config.json", "latent_lpips.safetensors"


def is_latent_lpips(folder: str | Path) -> bool:
    """Whether a folder holds one."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / WEIGHTS).is_file()


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


def load_latent_lpips(folder: str | Path) -> tuple[LatentLPIPS, Any]:
    """Reads what `save_latent_lpips` wrote.

    Returns:
      The module and its parameters, float32, on the host.

    Raises:
      FileNotFoundError: the folder lacks one of the two files.
      ValueError: a file is damaged, or the two do not belong together.
    """
    folder = Path(folder)
    if not is_latent_lpips(folder):
        raise FileNotFoundError(f"{folder} holds no latent LPIPS ({CONFIG}, {WEIGHTS})")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        network = LatentLPIPS(tuple(config["widths"]))
        latents = jax.ShapeDtypeStruct((1, 4, 4, config["channels"]), jnp.float32)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: a file of the latent LPIPS is damaged ({error})") from error
    shapes = jax.eval_shape(network.init, jax.random.key(0), latents, latents)["params"]
    wanted = {k: v.shape for k, v in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
    found = {name: leaf.shape for name, leaf in tensors.items()}
    if found != wanted:
        wrong = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {', '.join(wrong[:4])}")
    floats = {name: leaf.astype(np.float32) for name, leaf in tensors.items()}
    return network, flax.traverse_util.unflatten_dict(floats, sep="/")
