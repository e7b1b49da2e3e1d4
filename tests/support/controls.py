"""Configs of control networks as their hub folders hold them, and how to shrink them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.families import SD_15, SD_21, shrink
from tests.support.published import UNET as SDXL
from tests.support.tiny_pipeline import random_params
from tlcm_jax.families.base import abstract_params
from tlcm_jax.io.pipeline_folder import write_component
from tlcm_jax.models.controlnet import ControlNetConfig, ControlNetModel
from tlcm_jax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig

# What a ControlNet has of its own; all else is its UNet's.
_OWN = {
    "_class_name": "ControlNetModel",
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
_NOT_OF_CONTROLNETS = ("out_channels", "sample_size", "up_block_types")


def of_unet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNet begun from a UNet."""
    return {k: v for k, v in unet.items() if k not in _NOT_OF_CONTROLNETS} | _OWN


# ControlNet's config, and its UNet's.
CONTROLNETS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "sdxl": (of_unet(SDXL), SDXL),
    # diffusers' controlnet-canny-sdxl-1.0-small: no attention.
    "sdxl-small": (
        of_unet(SDXL)
        | {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
        SDXL,
    ),
    "sd-1.5": (of_unet(SD_15), SD_15),
    "sd-2.1": (of_unet(SD_21) | {"controlnet_conditioning_channel_order": "bgr"}, SD_21),
}

# T2I-Adapter's config, and its UNet's.
ADAPTERS: dict[str, tuple[dict[str, Any], Mapping[str, Any]]] = {
    "sdxl": (
        {
            "_class_name": "T2IAdapter", "adapter_type": "full_adapter_xl", "in_channels": 3,
            "channels": [320, 640, 1280, 1280], "downscale_factor": 16, "num_res_blocks": 2,
        },
        SDXL,
    ),
    "sd-1.5-full": (
        {
            "_class_name": "T2IAdapter", "adapter_type": "full_adapter", "in_channels": 1,
            "channels": [320, 640, 1280, 1280], "downscale_factor": 8, "num_res_blocks": 2,
        },
        SD_15,
    ),
    "sd-1.5-light": (
        {
            "_class_name": "T2IAdapter", "adapter_type": "light_adapter", "in_channels": 3,
            "channels": [320, 640, 1280], "downscale_factor": 8, "num_res_blocks": 4,
        },
        SD_15,
    ),
}  # fmt: skip


def shrunk_controlnet(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ControlNet's config, small."""
    small = shrink(config | {"up_block_types": []})
    return {k: v for k, v in small.items() if k not in _NOT_OF_CONTROLNETS} | {
        "conditioning_embedding_out_channels": [4, 8, 12, 16]
    }


def shrunk_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """A T2I-Adapter's config, small."""
    return dict(config, channels=[16 * width // 320 for width in config["channels"]])


# For the tiny pipeline, whose autoencoder makes one of four pixels a side.
TINY_ADAPTER = {
    "_class_name": "T2IAdapter", "adapter_type": "full_adapter_xl", "in_channels": 3,
    "channels": [32, 64], "downscale_factor": 8, "num_res_blocks": 1,
}  # fmt: skip


def tiny_controlnet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNet for the tiny pipeline's UNet."""
    return of_unet(unet) | {"conditioning_embedding_out_channels": [8, 12, 16]}


def write_control(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Writes a control network of random weights in diffusers' layout, and returns its folder."""
    kind = config["_class_name"] == "T2IAdapter"
    network = (
        T2IAdapter(T2IAdapterConfig.from_dict(config))
        if kind
        else ControlNetModel(ControlNetConfig.from_dict(config))
    )
    params = random_params(abstract_params(network), np.random.default_rng(seed))
    write_component(folder, config, params)
    return folder
