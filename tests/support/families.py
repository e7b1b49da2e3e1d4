"""UNet configs of the families as their hub folders hold them, and how to shrink one.

A family joins the parity tests with one line of `UNETS`.
"""

from collections.abc import Mapping
from typing import Any

from tests.support.published import UNET as SDXL

SD_15 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD_21 = SD_15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}
SSD_1B = SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
}
SEGMIND_VEGA = SSD_1B | {
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
}
UNETS: dict[str, Mapping[str, Any]] = {
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "sdxl-inpainting": SDXL | {"in_channels": 9},
    "sdxl-lcm": SDXL | {"time_cond_proj_dim": 256},
    "ssd-1b": SSD_1B,
    "segmind-vega": SEGMIND_VEGA,
    "koala-700m": SDXL
    | {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [0, 2, 5]},
    "sd-1.5": SD_15,
    "sd-1.5-lcm": SD_15 | {"time_cond_proj_dim": 256},
    "sd-2.1": SD_21,
}


_DEPTHS = {
    "transformer_layers_per_block": "down_block_types",
    "reverse_transformer_layers_per_block": "up_block_types",
}


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config some thousand times smaller with every structural feature of `config`.

    Kept: block types, their order and number of layers, which levels are as wide as each other,
    which transformers are as deep as each other and which are deeper, head counts that are one
    number or one a level, every switch. Widths become multiples of 16, depths their rank.
    """
    base = config["block_out_channels"][0]
    heads = config["attention_head_dim"]
    first = heads[0] if isinstance(heads, list) else heads
    small = dict(
        config,
        block_out_channels=[16 * width // base for width in config["block_out_channels"]],
        attention_head_dim=_map(lambda count: 2 * count // first, heads),
        cross_attention_dim=24,
        norm_num_groups=8,
        sample_size=16,
    )
    used = sorted(_used_depths(config))
    least = 2 if len(used) == 1 and used[0] > 1 else 1
    for name in _DEPTHS:
        if config.get(name) is not None:
            small[name] = _map(
                lambda depth: least + used.index(depth) if depth in used else 1, config[name]
            )
    if config.get("addition_embed_type") == "text_time":
        embedded = config["projection_class_embeddings_input_dim"] - 1280  # of the pooled text
        ids = embedded // config["addition_time_embed_dim"]
        small.update(addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 8 * ids)
    if config.get("time_cond_proj_dim"):
        small["time_cond_proj_dim"] = 12
    return small


def _used_depths(config: Mapping[str, Any]) -> set[int]:
    """The transformer depths of the blocks that have attention."""
    depths = set()
    for name, blocks in _DEPTHS.items():
        values = config.get(name)
        if values is None:
            continue
        for i, block in enumerate(config[blocks]):
            if "CrossAttn" in block:
                value = values[i] if isinstance(values, list) else values
                depths |= {*value} if isinstance(value, list) else {value}
    return depths


def _map(function: Any, value: Any) -> Any:
    return [_map(function, v) for v in value] if isinstance(value, list) else function(value)
