"""Single-file checkpoints of Stable Diffusion: all networks in one safetensors file, no configs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from tlcm_jax.io import names
from tlcm_jax.io.files import cast, save_tensors
from tlcm_jax.io.hub import HubId
from tlcm_jax.io.ldm_names import PREFIXES, UNET, places
from tlcm_jax.io.places import PlacedTensors
from tlcm_jax.io.sources import SingleFile
from tlcm_jax.io.tensors import TensorFile, Tensors

# The repositories whose configs and tokenizers a file of each layout goes with.
_PUBLISHED = {
    "sdxl": HubId("stabilityai/stable-diffusion-xl-base-1.0"),
    "sd": HubId("stable-diffusion-v1-5/stable-diffusion-v1-5"),
}

# Tensors of such files that are no weights of the networks: the noise schedule's tables, a copy of
# the UNet's moving average, CLIP's training temperature.
_NO_WEIGHTS = re.compile(
    r"model_ema\..*|denoiser\..*|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|betas|logvar|lvlb_weights|posterior_\w+|.*\.logit_scale|.*\.position_ids"
)


class LdmFile(SingleFile):
    """An open checkpoint of latent-diffusion's layout.

    Attributes:
      layout: `sdxl` or `sd`, a key of `ldm_names.PREFIXES`.
    """

    def __init__(self, path: Path, tensors: TensorFile, layout: str):
        """As `open` calls it."""
        self.layout = layout
        self.published = _PUBLISHED[layout]
        self._path = path
        self._tensors = tensors
        self._used: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> "LdmFile | None":
        """Opens a file; None if it holds no UNet of this layout.

        Raises:
          ValueError: a broken file, or one that is no whole checkpoint of SDXL or SD 1.x.
        """
        tensors = TensorFile([path])

        def has(prefix: str) -> bool:
            return any(key.startswith(prefix) for key in tensors)

        if not has(PREFIXES["sdxl"][UNET]):
            return None
        for layout, prefixes in PREFIXES.items():
            if all(has(prefix) for prefix in prefixes.values()):
                return cls(path, tensors, layout)
        raise ValueError(
            f"{path} holds a UNet but not the autoencoder and text encoders of SDXL or SD 1.x; "
            "other families, SD 2.x among them, are read from their diffusers folder"
        )

    def component(self, name: str, shapes: Mapping) -> Tensors:
        """See `SingleFile`."""
        found = places(name, names.to_torch_names(shapes), self.layout)
        # Some SD 1.x files leave out the tower's `text_model.`.
        component = PlacedTensors(
            self._tensors, found, former=lambda key: key.replace(".text_model.", ".")
        )
        self._used.update(component.keys_used)
        return component

    def check_all_used(self) -> None:
        """See `SingleFile`."""
        left = [key for key in self._tensors if key not in self._used]
        unknown = [f"unexpected {key}" for key in left if not _NO_WEIGHTS.fullmatch(key)]
        names.raise_if(unknown, f"{self._path} does not fit its config")
        if left:
            logging.info("%s: left out %d tensors that are no weights", self._path, len(left))


def layout_of(configs: Mapping[str, Any]) -> str:
    """The layout, a key of `ldm_names.PREFIXES`, that a pipeline is written in.

    Args:
      configs: `LatentModel.configs`.

    Raises:
      ValueError: there is none for it.
    """
    if "text_encoder_2" in configs:
        return "sdxl"
    if configs["text_encoder"].get("hidden_act", "quick_gelu") != "quick_gelu":
        # OpenCLIP's tower without its last layer, which the file's readers expect.
        raise ValueError("SD 2.x cannot be written as a single file; export it as a pipeline")
    return "sd"


def write_single_file(
    path: Path,
    params: Mapping[str, Any],
    layout: str,
    dtype: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes all networks into one file.

    Args:
      path: the file.
      params: a Flax tree for each component.
      layout: a key of `ldm_names.PREFIXES`.
      dtype: one of `files.DTYPES`.
      metadata: text for the header.

    Raises:
      ValueError: a tensor that the layout has no place for, or that does not fit in the dtype.
      OSError: the file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for component, tree in params.items():
        stored = names.to_torch(jax.tree.map(np.asarray, tree))
        parts: dict[str, dict[int, np.ndarray]] = {}
        for name, place in places(component, stored, layout).items():
            value = cast(f"{component} {name}", stored[name], dtype)
            if place.convolution:
                value = value[:, :, None, None]
            if place.part is not None:
                parts.setdefault(place.key, {})[place.part] = value
                continue
            tensors[place.key] = np.ascontiguousarray(value.T if place.transposed else value)
        for key, thirds in parts.items():
            tensors[key] = np.concatenate([thirds[i] for i in range(3)])
    save_tensors(path, tensors, metadata)
