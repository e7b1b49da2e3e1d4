"""Control networks that training begins with: the UNet that they steer draws as without them.

A ControlNet's encoder is a copy of the UNet's, and the convolutions that its residuals pass, the
last one of E included, are zero (Zhang et al. 2023, arXiv 2302.05543): the rules of diffusers'
`ControlNetModel.from_unet`. A T2I-Adapter is random but for its first convolution, which is zero.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.controls import ControlNetwork
from tlcm_jax.families.product import Params
from tlcm_jax.io.control_files import ADAPTER, CONTROLNET, copied_config
from tlcm_jax.models.controlnet import (
    ControlNetConditioningEmbedding,
    ControlNetConfig,
    ControlNetModel,
)
from tlcm_jax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from tlcm_jax.models.unet import UNet2DConditionModel

KINDS = ("controlnet", "t2i-adapter")
WIDTHS = (16, 32, 96, 256)  # diffusers' own, for factors up to 8
_EMBEDDING = "controlnet_cond_embedding"


def new_control(
    kind: str,
    unet: UNet2DConditionModel,
    unet_config: Mapping[str, Any],
    unet_params: Params,
    factor: int,
    key: PRNGKeyArray,
    *,
    channels: int = 3,
    widths: Sequence[int] = (),
) -> tuple[ControlNetwork, dict[str, Any]]:
    """A control network to train, fp32, and its config as diffusers writes it.

    Args:
      kind: one of `KINDS`.
      unet: what it is to steer.
      unet_config: the UNet's JSON.
      unet_params: its weights.
      factor: side of a latent pixel in pixels.
      key: of the random weights.
      channels: of the maps, 3 or 1.
      widths: of a ControlNet's stages E, each after the first at half the resolution; diffusers'
        by default.

    Raises:
      ValueError: another kind, or widths that do not bring a map to the latents' size.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "t2i-adapter":
        if widths:
            raise ValueError("embedding widths are of a ControlNet; a T2I-Adapter has none")
        return _adapter(unet, factor, key, channels)
    stages = factor.bit_length()
    widths = tuple(widths) or WIDTHS[:stages]
    if len(widths) != stages or 2 ** (stages - 1) != factor:
        raise ValueError(
            f"embedding widths {list(widths)}: this autoencoder makes one of {factor} pixels a "
            f"side, for which {stages} are needed"
        )
    config = copied_config(unet_config) | {
        "_class_name": CONTROLNET,
        "conditioning_channels": channels,
        "conditioning_embedding_out_channels": list(widths),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
    }
    network = ControlNetModel(ControlNetConfig.from_dict(config), unet.dtype, unet.remat)
    stack = ControlNetConditioningEmbedding(unet.config.block_out_channels[0], widths)
    fresh = stack.init(key, jnp.zeros((1, 2 * factor, 2 * factor, channels)))["params"]
    fresh["conv_out"] = jax.tree.map(jnp.zeros_like, fresh["conv_out"])

    def begun(name: str, shapes: Any) -> Params:
        if name == _EMBEDDING:
            return fresh
        if name in unet_params:
            return jax.tree.map(lambda x: jnp.array(x, jnp.float32), unet_params[name])
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    params = {name: begun(name, shapes) for name, shapes in abstract_params(network).items()}
    return ControlNetwork(network=network, params=params, source="new"), config


def _adapter(
    unet: UNet2DConditionModel, factor: int, key: PRNGKeyArray, channels: int
) -> tuple[ControlNetwork, dict[str, Any]]:
    blocks = unet.config.block_out_channels
    # A first block without attention takes features after its downsampler, as SDXL's does.
    xl = unet.config.down_block_types[0] == "DownBlock2D"
    config = {
        "_class_name": ADAPTER,
        "adapter_type": "full_adapter_xl" if xl else "full_adapter",
        "in_channels": channels,
        # SDXL's has features for the middle too.
        "channels": [*blocks, *blocks[2:][-1:]] if xl else list(blocks),
        "downscale_factor": factor * (1 + xl),
        "num_res_blocks": 2,
    }
    network = T2IAdapter(T2IAdapterConfig.from_dict(config), unet.dtype)
    params = network.init(key, *network.example())["params"]
    first = params["adapter"]["conv_in"]
    params["adapter"]["conv_in"] = jax.tree.map(jnp.zeros_like, first)
    return ControlNetwork(network=network, params=params, source="new"), config
