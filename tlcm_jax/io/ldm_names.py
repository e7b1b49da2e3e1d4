"""Names in single-file checkpoints (the layout of latent-diffusion, ComfyUI and A1111).

One rule for both directions: from the name that a tensor has in a diffusers folder to its place in
the file. The UNet's blocks are counted through there, `input_blocks.K` and `output_blocks.K`; the
autoencoder's decoder counts its levels from the other end; OpenCLIP's towers fuse q, k and v and
store their projection transposed.

| component | prefix: SDXL | SD 1.x |
|---|---|---|
| `unet` | `model.diffusion_model.` | the same |
| `vae` | `first_stage_model.` | the same |
| `text_encoder` | `conditioner.embedders.0.transformer.` | `cond_stage_model.transformer.` |
| `text_encoder_2` | `conditioner.embedders.1.model.` | |

SD 2.x's text encoder is OpenCLIP's, `cond_stage_model.model.`, with one layer more than is used.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from tlcm_jax.io.places import Place

UNET = "unet"
PREFIXES: Mapping[str, Mapping[str, str]] = {
    "sdxl": {
        UNET: "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd": {
        UNET: "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
    "sd2": {
        UNET: "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.model.",
    },
}

_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FUSED = ("q_proj", "k_proj", "v_proj")


def places(component: str, names: Iterable[str], layout: str) -> dict[str, Place]:
    """The place of every tensor of a component.

    Args:
      component: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
      names: all its tensors, as a diffusers folder names them.
      layout: a key of `PREFIXES`.

    Raises:
      ValueError: a tensor that the layout has no place for; it is named.
    """
    names = list(names)
    prefix = PREFIXES[layout][component]
    if component == UNET:
        layers = unet_layers(name.rpartition(".")[0] for name in names)
        found = {
            name: Place(f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}")
            for name in names
        }
    elif component == "vae":
        top = 1 + max((int(n) for n in re.findall(r"up_blocks\.(\d+)", " ".join(names))), default=0)
        found = {name: _vae(name, top) for name in names}
    elif component == "text_encoder" and layout != "sd2":
        found = {name: Place(name) for name in names}
    else:
        found = {name: openclip_text(name) for name in names}
    return {
        name: dataclasses.replace(place, key=prefix + place.key) for name, place in found.items()
    }


def unet_layers(layers: Iterable[str]) -> dict[str, str]:
    """The single-file name of every layer of a UNet.

    Args:
      layers: all its layers (`down_blocks.1.resnets.0.conv1`): the number of blocks before a
        layer depends on the others.

    Raises:
      ValueError: a layer that the layout has no place for.
    """
    layers = list(layers)
    resnets: dict[str, dict[int, int]] = {"down": {}, "up": {}}
    attended = set()
    for layer in layers:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", layer):
            side, block, kind, i = match[1], int(match[2]), match[3], int(match[4])
            resnets[side][block] = max(resnets[side].get(block, 0), i + 1)
            if kind == "attentions":
                attended.add((side, block))
    return {layer: _unet(layer, resnets, attended) for layer in layers}


def _unet(layer: str, resnets: dict[str, dict[int, int]], attended: set) -> str:
    if layer in _UNET_TOP:
        return _UNET_TOP[layer]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer):
        i = 2 * int(match[2]) + (match[1] == "attentions")
        return f"middle_block.{i}.{_unet_inner(match[1], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer)
    if match is None:
        raise ValueError(f"the single-file layout has no place for the UNet's {layer}")
    side, block, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    before = [resnets[side].get(b, 0) for b in range(block)]
    if side == "down":
        # conv_in is block 0, and every level before this one ends with its downsampler.
        first, stem = 1 + sum(before) + block, "input_blocks"
    else:
        first, stem = sum(before), "output_blocks"
    if kind in ("resnets", "attentions"):
        return f"{stem}.{first + i}.{int(kind == 'attentions')}.{_unet_inner(kind, rest)}"
    last = first + resnets[side][block]
    if (kind, rest) == ("downsamplers", "conv"):
        return f"{stem}.{last}.0.op"
    if (kind, rest) == ("upsamplers", "conv"):
        return f"{stem}.{last - 1}.{1 + ((side, block) in attended)}.conv"
    raise ValueError(f"the single-file layout has no place for the UNet's {layer}")


def _unet_inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    if rest not in _UNET_RESNET:
        raise ValueError(f"the single-file layout has no place for a resnet's {rest}")
    return _UNET_RESNET[rest]


def _vae(name: str, levels: int) -> Place:
    key = name
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        key = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    elif match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        linear = match[2] != "group_norm" and match[3] == "weight"
        inner = _VAE_ATTENTION[match[2]]
        return Place(f"{match[1]}.mid.attn_1.{inner}.{match[3]}", convolution=linear)
    elif match := re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        stem = f"{match[1]}.{match[2]}.{level}"
        if match[4] == "resnets":
            key = f"{stem}.block.{match[5]}.{match[6]}"
        else:
            key = f"{stem}.{match[2]}sample.{match[6]}"
    return Place(key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out"))


def openclip_text(name: str) -> Place:
    """The place of a tensor of OpenCLIP's text tower, named as in transformers."""
    if name == "text_projection.weight":
        return Place("text_projection", transposed=True)
    inner = name.removeprefix("text_model.")
    if inner in _OPENCLIP:
        return Place(_OPENCLIP[inner])
    place = openclip_layer(inner)
    if place is None:
        raise ValueError(f"the single-file layout has no place for the text encoder's {name}")
    return place


def openclip_layer(name: str) -> Place | None:
    """The place of a tensor `encoder.layers.N.*` of either of OpenCLIP's towers, or None."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return None
    stem, layer, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
    projection = layer.removeprefix("self_attn.")
    if projection in _FUSED:
        return Place(f"{stem}.attn.in_proj_{leaf}", part=_FUSED.index(projection))
    return Place(f"{stem}.{_OPENCLIP_LAYER[layer]}.{leaf}")


def controlnet_places(names: Iterable[str], prefix: str = "control_model.") -> dict[str, Place]:
    """The place of every tensor of a ControlNet, in the layout that its authors published.

    Args:
      names: all its tensors, as a diffusers folder names them.
      prefix: what the file's names begin with; some have nothing there.

    Raises:
      ValueError: a tensor that the layout has no place for; it is named.
    """
    layers = {name: name.rpartition(".")[0] for name in names}
    hint = r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))"
    blocks = sum(bool(re.fullmatch(rf"{hint}\.weight", name)) for name in layers) - 2
    found = {}
    for layer in set(layers.values()):
        if match := re.fullmatch(hint, layer):
            number = {"conv_in": 0, "conv_out": blocks + 1}.get(match[1], int(match[2] or 0) + 1)
            found[layer] = f"input_hint_block.{2 * number}"
        elif match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", layer):
            found[layer] = f"zero_convs.{match[1]}.0"
        elif layer == "controlnet_mid_block":
            found[layer] = "middle_block_out.0"
    found |= unet_layers(set(layers.values()) - found.keys())
    return {
        name: Place(f"{prefix}{found[layer]}.{name.rpartition('.')[2]}")
        for name, layer in layers.items()
    }
