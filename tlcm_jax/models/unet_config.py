"""The UNet's `config.json`, read into what the Flax module needs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tlcm_jax.models.config_values import switch

# Fields whose only supported value is the one given: what they switch on is not implemented.
_ONLY = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,  # as in diffusers: the number lies in `attention_head_dim`
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_MOST_BLOCKS = 400
_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
_MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet2DConditionModel`; the names are diffusers' own.

    `upcast_attention` has no field: the softmax is fp32 in every compute dtype.

    Attributes:
      mid_block_type: `UNetMidBlock2DCrossAttn`, `UNetMidBlock2D` (one resnet and no attention:
        SSD-1B, Segmind-Vega) or None.
      sample_size: side of the latents it was trained on, or height and width.
      num_attention_heads: heads of each level (the files call it `attention_head_dim`).
      transformer_layers: for each level, the depth after each resnet of the down block.
      up_transformer_layers: the same for each up block, in the order they run.
      projection_class_embeddings_input_dim: width of the pooled text and of the embedded
        `time_ids` together: six of them in SDXL base, five in the refiner.
      time_cond_proj_dim: width of the guidance embedding of LCM-style networks.
    """

    in_channels: int
    out_channels: int
    sample_size: int | tuple[int, int]
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    mid_block_type: str | None
    layers_per_block: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    transformer_layers: tuple[tuple[int, ...], ...]
    up_transformer_layers: tuple[tuple[int, ...], ...]
    mid_transformer_layers: int
    cross_attention_dim: int
    use_linear_projection: bool
    norm_num_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    text_time: bool
    addition_time_embed_dim: int
    projection_class_embeddings_input_dim: int
    time_cond_proj_dim: int | None

    def __post_init__(self) -> None:
        # SDXL has 70 transformer blocks and 17 resnets outside its middle; each is traced.
        depths = (*self.transformer_layers, *self.up_transformer_layers)
        blocks = sum(sum(depth) for depth in depths) + self.mid_transformer_layers
        resnets = sum(len(depth) for depth in depths)
        if max(blocks, resnets) > _MOST_BLOCKS:
            raise ValueError(
                f"unet config: {resnets} resnets and {blocks} transformer blocks, over the "
                f"{_MOST_BLOCKS} that are traced (layers_per_block, transformer_layers_per_block)"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UNetConfig":
        """Parses a diffusers `unet/config.json`; absent keys take diffusers' defaults.

        Raises:
          ValueError: a field asks for something this port does not implement; it is named.
        """
        for name, value in _ONLY.items():
            if raw.get(name) not in (None, value):
                raise ValueError(
                    f"unet config: {name}={raw[name]!r} is not supported (only {value!r})"
                )
        channels = tuple(raw.get("block_out_channels", (320, 640, 1280, 1280)))
        levels = len(channels)
        down = tuple(raw.get("down_block_types", (*_DOWN_BLOCKS[:1] * 3, _DOWN_BLOCKS[1])))
        up = tuple(raw.get("up_block_types", (_UP_BLOCKS[1], *_UP_BLOCKS[:1] * 3)))
        for name, blocks, known in (
            ("down_block_types", down, _DOWN_BLOCKS),
            ("up_block_types", up, _UP_BLOCKS),
        ):
            _per_level(name, blocks, levels)
            for block in blocks:
                if block not in known:
                    raise ValueError(f"unet config: {name} {block!r} is not one of {known}")
        mid = raw.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        if mid not in _MID_BLOCKS:
            raise ValueError(f"unet config: mid_block_type={mid!r} is not one of {_MID_BLOCKS}")
        addition = raw.get("addition_embed_type")
        if addition not in (None, "text_time"):
            raise ValueError(f"unet config: addition_embed_type={addition!r} is not supported")

        layers = _per_level("layers_per_block", raw.get("layers_per_block", 2), levels)
        # diffusers' historical naming: `attention_head_dim` holds the number of heads.
        heads = _per_level("attention_head_dim", raw.get("attention_head_dim", 8), levels)
        groups = raw.get("norm_num_groups", 32)
        for width, count in zip(channels, heads, strict=True):
            if width % count or not groups or width % groups:
                raise ValueError(
                    f"unet config: {width} channels do not divide into {count} heads "
                    f"(attention_head_dim) and {groups} groups (norm_num_groups)"
                )
        depths, up_depths = _transformer_layers(raw, layers)
        cross = _per_level("cross_attention_dim", raw.get("cross_attention_dim", 1280), levels)
        if len(set(cross)) != 1:
            raise ValueError(f"unet config: cross_attention_dim={list(cross)} differs by level")
        # What diffusers' pipelines take where the config is silent.
        size = raw.get("sample_size") or (128 if addition == "text_time" else 64)
        if isinstance(size, list):
            size = tuple(size)
        return cls(
            in_channels=raw.get("in_channels", 4),
            out_channels=raw.get("out_channels", 4),
            sample_size=size,
            block_out_channels=channels,
            down_block_types=down,
            up_block_types=up,
            mid_block_type=mid,
            layers_per_block=layers,
            num_attention_heads=heads,
            transformer_layers=depths,
            up_transformer_layers=up_depths,
            mid_transformer_layers=depths[-1][0],
            cross_attention_dim=cross[0],
            use_linear_projection=switch(raw, "use_linear_projection", False),
            norm_num_groups=groups,
            norm_eps=raw.get("norm_eps", 1e-5),
            flip_sin_to_cos=switch(raw, "flip_sin_to_cos", True),
            freq_shift=raw.get("freq_shift", 0),
            text_time=addition == "text_time",
            addition_time_embed_dim=raw.get("addition_time_embed_dim") or 256,
            projection_class_embeddings_input_dim=raw.get("projection_class_embeddings_input_dim")
            or 0,
            time_cond_proj_dim=raw.get("time_cond_proj_dim"),
        )


def _transformer_layers(
    raw: Mapping[str, Any], layers: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Transformer depth after each resnet, of the down blocks and of the up blocks in their order.

    A level's depth is one number, or a list with one number for each resnet.
    """
    levels = len(layers)
    name, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = _per_level(name, raw.get(name, 1), levels)
    if raw.get(reverse) is not None:
        up = _per_level(reverse, raw[reverse], levels)
    elif any(isinstance(depth, list | tuple) for depth in down):
        raise ValueError(f"unet config: {name}={list(down)} differs by layer and needs {reverse}")
    else:
        up = down[::-1]
    return (
        tuple(_per_level(name, d, n) for d, n in zip(down, layers, strict=True)),
        tuple(_per_level(reverse, d, n + 1) for d, n in zip(up, reversed(layers), strict=True)),
    )


def _per_level(name: str, value: Any, levels: int) -> tuple:
    """One value for every level (or layer), from a scalar or a list of that length."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"unet config: {name}={list(values)} needs {levels} values")
    return values
