"""The UNet's `config.json`, read into what the Flax module needs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet2DConditionModel`; the names are diffusers' own.

    Attributes:
      num_attention_heads: heads of each level (the files call it `attention_head_dim`).
      transformer_layers: for each level, the depth after each resnet of the down block.
      up_transformer_layers: the same for each up block, in the order they run.
    """

    in_channels: int
    out_channels: int
    sample_size: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    has_mid_block: bool
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

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UNetConfig":
        """Parses a diffusers `unet/config.json`.

        Raises:
          ValueError: a field asks for something this port does not implement; it is named.
        """
        for name, value in _ONLY.items():
            if raw.get(name, value) != value:
                raise ValueError(
                    f"unet config: {name}={raw[name]!r} is not supported (only {value!r})"
                )
        channels = tuple(raw["block_out_channels"])
        levels = len(channels)
        down, up = tuple(raw["down_block_types"]), tuple(raw["up_block_types"])
        for block in (*down, *up):
            if block not in _BLOCKS:
                raise ValueError(f"unet config: block type {block!r} is not one of {_BLOCKS}")
        addition = raw.get("addition_embed_type")
        if addition not in (None, "text_time"):
            raise ValueError(f"unet config: addition_embed_type={addition!r} is not supported")
        mid = raw.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        if mid not in (None, "UNetMidBlock2DCrossAttn"):
            raise ValueError(f"unet config: mid_block_type={mid!r} is not supported")

        layers = _per_level(raw.get("layers_per_block", 2), levels)
        # diffusers' historical naming: `attention_head_dim` holds the number of heads.
        heads = raw.get("num_attention_heads") or raw.get("attention_head_dim", 8)
        depth = raw.get("transformer_layers_per_block", 1)
        depths = depth if isinstance(depth, list | tuple) else [depth] * levels
        reverse = raw.get("reverse_transformer_layers_per_block")
        reverse = list(reversed(depths)) if reverse is None else reverse
        last = depths[-1]
        cross = raw.get("cross_attention_dim", 1280)
        if isinstance(cross, list | tuple):
            if len(set(cross)) != 1:
                raise ValueError(f"unet config: cross_attention_dim={cross!r} differs by level")
            cross = cross[0]
        return cls(
            in_channels=raw.get("in_channels", 4),
            out_channels=raw.get("out_channels", 4),
            sample_size=raw.get("sample_size") or 64,
            block_out_channels=channels,
            down_block_types=down,
            up_block_types=up,
            has_mid_block=mid is not None,
            layers_per_block=layers,
            num_attention_heads=_per_level(heads, levels),
            transformer_layers=tuple(_per_level(d, n) for d, n in zip(depths, layers, strict=True)),
            up_transformer_layers=tuple(
                _per_level(d, n + 1) for d, n in zip(reverse, reversed(layers), strict=True)
            ),
            mid_transformer_layers=last[0] if isinstance(last, list | tuple) else last,
            cross_attention_dim=cross,
            use_linear_projection=raw.get("use_linear_projection", False),
            norm_num_groups=raw.get("norm_num_groups", 32),
            norm_eps=raw.get("norm_eps", 1e-5),
            flip_sin_to_cos=raw.get("flip_sin_to_cos", True),
            freq_shift=raw.get("freq_shift", 0),
            text_time=addition == "text_time",
            addition_time_embed_dim=raw.get("addition_time_embed_dim") or 256,
            projection_class_embeddings_input_dim=raw.get("projection_class_embeddings_input_dim")
            or 0,
            time_cond_proj_dim=raw.get("time_cond_proj_dim"),
        )


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    """One value for every level, from a scalar or a list of that length."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"unet config: {list(values)} needs one value for each of {levels} levels")
    return values
