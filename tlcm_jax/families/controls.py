"""Control networks of Stable Diffusion: read, checked against the model, and added up.

Several work together as diffusers' `MultiControlNetModel` and `MultiAdapter` do: each sees the same
latents, time and text, and their residuals are added.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.product import Params
from tlcm_jax.io import names
from tlcm_jax.io.control_files import CONTROLNET, ControlFiles
from tlcm_jax.io.json_files import parse
from tlcm_jax.io.placement import to_devices
from tlcm_jax.models.conditioning import Conditioning, ControlMap, Residuals
from tlcm_jax.models.controlnet import ControlNetConfig, ControlNetModel
from tlcm_jax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from tlcm_jax.models.unet import UNet2DConditionModel

Network = ControlNetModel | T2IAdapter


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ControlNetwork:
    """A control network with its weights.

    Attributes:
      network: without them.
      params: its tree.
      source: where they came from.
      folder: the local folder with its `config.json`; None of a single file.
    """

    network: Network
    params: Params
    source: str
    folder: Path | None = None

    @property
    def channels(self) -> int:
        """Of the pictures that it takes: 3, or 1 of grey ones."""
        config = self.network.config
        if isinstance(config, ControlNetConfig):
            return config.conditioning_channels
        return config.in_channels


def load_control(
    path: str | Path,
    unet: UNet2DConditionModel,
    unet_config: Mapping[str, Any],
    factor: int,
    param_dtype: Any = None,
) -> ControlNetwork:
    """Reads a ControlNet or T2I-Adapter for a UNet; `LatentModel.load_control` calls it.

    Args:
      path: as `io.control_files` reads it.
      unet: what it is to steer; of its compute dtype.
      unet_config: the UNet's JSON.
      factor: side of a latent pixel in pixels.
      param_dtype: of the weights; the compute dtype by default.

    Raises:
      FileNotFoundError: there is no such thing.
      ValueError: it is of another kind, or of another family than the UNet, or broken.
    """
    files = ControlFiles.open(path, unet_config, factor)
    read: Callable[..., Any] = (
        ControlNetConfig.from_dict if files.kind == CONTROLNET else T2IAdapterConfig.from_dict
    )
    config = parse(files.origin, files.config, read)
    network: Network
    if files.kind == CONTROLNET:
        _check_controlnet(str(path), config, unet, factor)
        network = ControlNetModel(config, unet.dtype, unet.remat)
    else:
        _check_adapter(str(path), config, unet, factor)
        network = T2IAdapter(config, unet.dtype)
    shapes = abstract_params(network, param_dtype or unet.dtype)
    tensors = files.component(shapes)
    views = names.match_tensors(tensors, shapes, str(path))
    try:
        params = to_devices(views, shapes, tensors.release)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    folder = files.origin.parent if files.origin.name == "config.json" else None
    return ControlNetwork(network=network, params=params, source=str(path), folder=folder)


def _check_controlnet(
    path: str, config: ControlNetConfig, unet: UNet2DConditionModel, factor: int
) -> None:
    """Refuses a ControlNet of another family by what tells the two apart."""
    told = {
        "text states of width {}": "cross_attention_dim",
        "blocks of widths {}": "block_out_channels",
        "layers a block {}": "layers_per_block",
        "text_time conditioning {}": "text_time",
        "pooled text and sizes of width {}": "projection_class_embeddings_input_dim",
    }
    for words, name in told.items():
        own, wanted = getattr(config, name), getattr(unet.config, name)
        if own != wanted:
            raise ValueError(
                f"--control {path} is a ControlNet of another family than the model: "
                f"{words.format(own)}, the model's {wanted}; take one made for it"
            )
    if config.downsampling != factor:
        raise ValueError(
            f"--control {path} makes one of {config.downsampling} pixels a side, and the model's "
            f"autoencoder one of {factor}; take one made for it"
        )


def _check_adapter(
    path: str, config: T2IAdapterConfig, unet: UNet2DConditionModel, factor: int
) -> None:
    """Refuses a T2I-Adapter whose features have no place in the UNet."""
    blocks = unet.config.block_out_channels
    widths = config.channels
    if config.adapter_type == "light_adapter":
        widths = (*widths, widths[-1])
    # Block 0 of SDXL, without attention, hands its features on after its downsampler.
    first = factor * (1 + (unet.config.down_block_types[0] == "DownBlock2D"))
    if widths[: len(blocks)] != blocks or config.downscale_factor != first:
        raise ValueError(
            f"--control {path} is a T2I-Adapter of another family than the model: features of "
            f"widths {list(widths)} at 1/{config.downscale_factor}, the model's blocks are "
            f"{list(blocks)} at 1/{first}; take one made for it"
        )


def control_residuals(
    controls: Sequence[tuple[Network, Params]],
    z: Float[Array, "b h w c"],
    t: Num[Array, " b"],
    conditioning: Conditioning,
) -> Residuals | None:
    """What all control networks add, each steered by its map of `conditioning`; traceable.

    Args:
      controls: in the order of the maps.
      z: the UNet's latents.
      t: their times.
      conditioning: leading axis b.

    Raises:
      ValueError: another number of maps, or residuals that do not fit each other.
    """
    maps: tuple[ControlMap, ...] = conditioning.controls
    if len(maps) != len(controls):
        raise ValueError(f"{len(controls)} control networks, and maps for {len(maps)}")
    total = None
    for (network, params), told in zip(controls, maps, strict=True):
        variables = {"params": params}
        if isinstance(network, T2IAdapter):
            found: Any = network.apply(variables, told.image, told.scale)
        else:
            found = network.apply(
                variables, z, t, conditioning.prompt_embeds, told.image, told.scale,
                conditioning.pooled, conditioning.time_ids,
            )  # fmt: skip
        total = found if total is None else total.plus(found)
    return total


def control_maps(
    images: Sequence[Float[Array, "b h w c"]], scales: Sequence[float]
) -> tuple[ControlMap, ...]:
    """The maps of a batch; traceable.

    Args:
      images: in 0 .. 1, one for each network.
      scales: of each.
    """
    return tuple(
        ControlMap(image=image, scale=jnp.full(image.shape[0], scale, jnp.float32))
        for image, scale in zip(images, scales, strict=True)
    )
