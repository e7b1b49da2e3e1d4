"""LPIPS as it is published: torchvision's trunk and the package's weights of its features."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tlcm_jax.io.places import Place, PlacedTensors
from tlcm_jax.io.scorer_files import read_params
from tlcm_jax.io.tensors import TensorFile, refuse_pickle
from tlcm_jax.models.lpips import LPIPS, STAGES

# Of each trunk: the package's file, and torchvision's.
FILES = {
    "alex": ("alex", "alexnet-owt-7be5be79"),
    "vgg": ("vgg", "vgg16-397923af"),
}


def load_lpips(folder: str | Path, trunk: str = "alex") -> tuple[LPIPS, Any]:
    """Loads LPIPS, version 0.1.

    Args:
      folder: holds both files, as safetensors.
      trunk: a key of `FILES`.

    Returns:
      The module and its parameters, float32, on the host.

    Raises:
      FileNotFoundError: a file is missing; the message says where it comes from.
      ValueError: an unknown trunk, a pickle, or a file of another network.
    """
    if trunk not in FILES:
        raise ValueError(f"lpips: trunk {trunk!r} is not one of {', '.join(FILES)}")
    folder = Path(folder)
    origins = ("weights/v0.1 of the package lpips", "torchvision's models")
    files = [folder / f"{stem}.safetensors" for stem in FILES[trunk]]
    for file, origin in zip(files, origins, strict=True):
        if not file.is_file():
            for other in sorted(folder.glob(f"{file.stem}.*")):
                refuse_pickle(other)
            raise FileNotFoundError(
                f"lpips: {file} is missing; convert {file.stem}.pth of {origin} and put it there"
            )
    tensors = TensorFile(files)
    places = {
        f"net.slice{stage + 1}.{layer}.{leaf}": Place(f"features.{layer}.{leaf}")
        for stage, (_, convolutions) in enumerate(STAGES[trunk])
        for layer, *_ in convolutions
        for leaf in ("weight", "bias")
    }
    places |= {key: Place(key) for key in tensors if key.startswith("lin")}
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    network = LPIPS(trunk)
    placed = PlacedTensors(tensors, places, left_out=lambda key: key.startswith("classifier."))
    return network, read_params(placed, network, (images, images), str(folder))
