"""Where a control network's PATH leads: its config, and its tensors by diffusers' names.

A folder says in its `config.json` what it holds. A single file does not: what it leaves open is the
UNet's that it steers, of which it is a copy, and its tensors say where it is smaller than that.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.io import buckets, names
from tlcm_jax.io.checkpoint_kinds import describe_keys
from tlcm_jax.io.hub import HubId, fetch_files
from tlcm_jax.io.json_files import naming, read_object
from tlcm_jax.io.ldm_names import controlnet_places
from tlcm_jax.io.places import PlacedTensors
from tlcm_jax.io.tensors import (
    STEMS,
    TensorFile,
    Tensors,
    open_component,
    refuse_pickle,
    refuse_quantised,
    weights_name,
)

CONTROLNET, ADAPTER = "ControlNetModel", "T2IAdapter"
# Networks that steer in other ways, by what only their tensors are called.
_OTHERS = (
    (r"task_embedding|control_add_embedding|spatial_ch_projs|transformer_layes\.",
     "a union ControlNet (ControlNet++, ProMax)"),
    (r"ctrl_to_base|base_to_ctrl|enc_zero_convs", "a ControlNet-XS"),
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"^lllite_", "a ControlLLLite"),
    (r"^(adapter\.)?body\.\d+\.block\d", "a T2I-Adapter by its authors' own names"),
)  # fmt: skip
_KNOWN = "only a plain ControlNet (ControlNetModel) or T2I-Adapter (T2IAdapter) is read here"
_CONV_IN = "controlnet_cond_embedding.conv_in.weight"
_HINT = re.compile(r"(?:control_model\.)?input_hint_block\.(\d+)\.weight")
# What of a UNet's config a ControlNet's has not.
_NOT_COPIED = (
    "_class_name", "out_channels", "sample_size", "up_block_types", "time_cond_proj_dim",
    "reverse_transformer_layers_per_block",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlFiles:
    """A control network's files.

    Attributes:
      kind: `CONTROLNET` or `ADAPTER`.
      config: its JSON.
      origin: where that came from, for messages.
      tensors: as stored.
    """

    kind: str
    config: Mapping[str, Any]
    origin: Path
    tensors: Tensors

    @classmethod
    def open(cls, path: str | Path, unet: Mapping[str, Any], factor: int) -> "ControlFiles":
        """Finds a control network, fetching what is needed of a hub id.

        Args:
          path: a folder with its `config.json`, a hub id, or a safetensors file, by diffusers'
            names or those of its authors (`control_model.`).
          unet: the config of the UNet that it is to steer, for a file without one.
          factor: side of a latent pixel of that model in pixels, likewise.

        Raises:
          FileNotFoundError: there is no such thing.
          ValueError: it is another kind of network, or its weights are pickled.
        """
        local = buckets.local(path)
        if local.is_file():
            refuse_pickle(local)
            tensors = TensorFile([local])
            refuse_quantised(tensors, str(path))
            return _of_file(local, tensors, unet, factor)
        if not local.is_dir():
            hub_id = HubId.parse(path)
            if hub_id is None:
                raise FileNotFoundError(
                    f"--control {path}: there is no such file, folder or hub id"
                )
            local = fetch_files(hub_id, _needed)
        if not (local / "config.json").is_file():
            raise FileNotFoundError(f"--control {path} holds no config.json of a control network")
        config = read_object(local / "config.json", "control network's folder")
        kind = config.get("_class_name", CONTROLNET)
        if kind not in (CONTROLNET, ADAPTER):
            raise ValueError(f"--control {path} holds a {str(kind)[:60]}; {_KNOWN}")
        return cls(
            kind=kind,
            config=config,
            origin=local / "config.json",
            tensors=open_component(local, STEMS[0]),
        )

    def component(self, shapes: Mapping) -> Tensors:
        """The tensors by the names of a diffusers folder.

        Args:
          shapes: the network's tree of `jax.ShapeDtypeStruct`.
        """
        hints = [key for key in self.tensors if _HINT.fullmatch(key)]
        if not hints:
            return self.tensors
        prefix = "control_model." if hints[0].startswith("control_model.") else ""
        found = controlnet_places(names.to_torch_names(shapes), prefix)
        # Whole checkpoints of the authors hold the UNet and all else beside it.
        return PlacedTensors(
            self.tensors,
            found,
            left_out=lambda key: bool(prefix) and not key.startswith(prefix),
        )


def _of_file(file: Path, tensors: TensorFile, unet: Mapping[str, Any], factor: int) -> ControlFiles:
    for pattern, other in _OTHERS:
        if any(re.search(pattern, key) for key in tensors):
            raise ValueError(f"--control {file} is {other}; {_KNOWN}")
    with naming(file):
        if any(key.startswith("adapter.body.") for key in tensors):
            kind, config = ADAPTER, _adapter_config(tensors, unet, factor)
        elif _CONV_IN in tensors or any(map(_HINT.fullmatch, tensors)):
            kind, config = CONTROLNET, _controlnet_config(tensors, unet)
        else:
            held = describe_keys(tensors) or "no file of a control network"
            raise ValueError(f"--control names {held}; {_KNOWN}")
    return ControlFiles(kind=kind, config=config, origin=file, tensors=tensors)


def copied_config(unet: Mapping[str, Any]) -> dict[str, Any]:
    """What a ControlNet's config has of its UNet's."""
    return {key: value for key, value in unet.items() if key not in _NOT_COPIED}


def _controlnet_config(tensors: Tensors, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a copy of a UNet, as far as a file's tensors do not say otherwise."""
    config = copied_config(unet)
    convolutions: dict[int, int] = {}
    for key in tensors:
        if match := _HINT.fullmatch(key):
            convolutions[int(match[1])] = tensors[key].shape[0]
        elif match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)\.weight", key):
            convolutions[int(match[1]) + 1] = tensors[key].shape[0]
        elif key == _CONV_IN:
            convolutions[0] = tensors[key].shape[0]
    widths = [convolutions[i] for i in sorted(convolutions)]
    ldm = any(map(_HINT.fullmatch, tensors))
    config["conditioning_embedding_out_channels"] = (widths[:-1] if ldm else widths)[::2]
    if ldm:
        prefix = "control_model." if "control_model.input_hint_block.0.weight" in tensors else ""
        config["in_channels"] = tensors[f"{prefix}input_blocks.0.0.weight"].shape[1]
        return config
    config["in_channels"] = tensors["conv_in.weight"].shape[1]
    depths: dict[str, int] = {}
    for key in tensors:
        if match := re.match(r"(down_blocks\.\d+|mid_block)\.attentions\.\d+\.(.*)", key):
            layer = re.match(r"transformer_blocks\.(\d+)\.", match[2])
            depths[match[1]] = max(depths.get(match[1], 1), int(layer[1]) + 1 if layer else 1)
    levels = [f"down_blocks.{i}" for i in range(len(config.get("block_out_channels", [0] * 4)))]
    config["down_block_types"] = [
        "CrossAttnDownBlock2D" if level in depths else "DownBlock2D" for level in levels
    ]
    config["mid_block_type"] = (
        "UNetMidBlock2DCrossAttn" if "mid_block" in depths else "UNetMidBlock2D"
    )
    per_level = [depths.get(level, 1) for level in levels]
    # The middle is as deep as the last level is said to be.
    config["transformer_layers_per_block"] = [
        *per_level[:-1], depths.get("mid_block", per_level[-1])
    ]  # fmt: skip
    return config


def _adapter_config(tensors: Tensors, unet: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """The config of a T2I-Adapter, by its widths and by the model that it is for."""
    light = "adapter.conv_in.weight" not in tensors
    sdxl = unet.get("addition_embed_type") == "text_time" and not light
    factor *= 1 + sdxl
    stem = "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"
    blocks: dict[int, dict[int, int]] = {}
    widths: dict[int, int] = {}
    for key in tensors:
        if match := re.fullmatch(r"adapter\.body\.(\d+)\.resnets\.(\d+)\.block2\.weight", key):
            blocks.setdefault(int(match[1]), {})[int(match[2])] = tensors[key].shape[0]
        elif match := re.fullmatch(r"adapter\.body\.(\d+)\.out_conv\.weight", key):
            widths[int(match[1])] = tensors[key].shape[0]
    if stem not in tensors or not blocks:
        raise ValueError("a T2I-Adapter's file without the tensors of one; fetch it again")
    channels = [widths[i] if light else blocks[i][0] for i in sorted(blocks)]
    return {
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if sdxl else "full_adapter",
        "channels": channels[:-1] if light else channels,
        "downscale_factor": factor,
        "in_channels": tensors[stem].shape[1] // factor**2,
        "num_res_blocks": len(blocks[0]),
    }


def _needed(listed: Sequence[str]) -> list[str]:
    """Which of a repository's files are its control network's."""
    name = weights_name(listed, STEMS[0])
    if "config.json" not in listed or name is None:
        raise FileNotFoundError(
            "that repository holds no control network's config.json and safetensors; give the "
            "path of a file of it"
        )
    shards = [f for f in listed if re.fullmatch(rf"{STEMS[0]}.*-of-\d+.*\.safetensors", f)]
    return ["config.json", name, *(shards if name.endswith(".json") else ())]
