"""How other programs find the layer that a key of a LoRA file is for, by their documented names.

Each function gives the layer of latent-diffusion's UNet that a kohya-style name is applied to, or
None where the program leaves the key out with a line in its log, or without.
"""

import re
from collections.abc import Iterable, Mapping

# Of a residual block, diffusers' names of latent-diffusion's layers.
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def comfyui(layers: Iterable[str]) -> dict[str, str]:
    """ComfyUI's and Forge's map: stem of the keys to layer.

    Every layer under `lora_unet_` and its own name, dots as underscores; again under diffusers'
    name of it; and under diffusers' name with dots, `.to_` as `.processor.to_`.
    """
    known = {f"lora_unet_{layer.replace('.', '_')}": layer for layer in layers}
    for name, layer in diffusers_names(layers).items():
        known[f"lora_unet_{name.replace('.', '_')}"] = layer
        dotted = name.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
        known[f"unet.{dotted}"] = layer
    return known


def a1111(stem: str, layers: Iterable[str]) -> str | None:
    """A1111's rule: diffusers' names by patterns of SD 1.x; any other name as it stands."""
    modules = {f"diffusion_model_{layer.replace('.', '_')}": layer for layer in layers}
    return modules.get(_compvis(stem)) or modules.get(stem.replace("lora_unet", "diffusion_model"))


def _compvis(stem: str) -> str:
    prefix = "diffusion_model_"
    if m := re.match(r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", stem):
        number, inner = 1 + 3 * int(m[1]) + int(m[3]), _inner(m[2], m[4])
        return f"{prefix}input_blocks_{number}_{int(m[2] == 'attentions')}_{inner}"
    if m := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", stem):
        number = 1 if m[1] == "attentions" else 2 * int(m[2])
        return f"{prefix}middle_block_{number}_{_inner(m[1], m[3])}"
    if m := re.match(r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", stem):
        number, inner = 3 * int(m[1]) + int(m[3]), _inner(m[2], m[4])
        return f"{prefix}output_blocks_{number}_{int(m[2] == 'attentions')}_{inner}"
    if m := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", stem):
        return f"{prefix}input_blocks_{3 + 3 * int(m[1])}_0_op"
    if m := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", stem):
        return f"{prefix}output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) else 1}_conv"
    return stem


def _inner(kind: str, rest: str) -> str:
    names = {theirs: ours.replace(".", "_") for ours, theirs in _RESNET.items()}
    return names[rest] if kind == "resnets" else rest


def sd_scripts(layers: Mapping[str, tuple[str, tuple[int, ...]]], sdxl: bool) -> dict[str, str]:
    """sd-scripts' modules: those of four classes, by its own network's names.

    Its network of SDXL has latent-diffusion's names, that of SD 1.x diffusers'.
    """
    names = {layer: layer for layer, (kind, _) in layers.items() if kind}
    if not sdxl:
        names = {layer: name for name, layer in diffusers_names(names).items()}
    return {f"lora_unet_{name.replace('.', '_')}": layer for layer, name in names.items()}


def diffusers_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer by diffusers' name, for all inside the blocks of a UNet of two residual blocks a level.

    Two go down a level and three up; a level's last block down is its downsampler.
    """
    found = {}
    for layer in layers:
        side, *inside = layer.split(".")
        if side == "middle_block":
            i, rest = int(inside[0]), ".".join(inside[1:])
            found["mid_block." + _part(i % 2, i // 2, rest)] = layer
        elif side in ("input_blocks", "output_blocks") and (side, inside[0]) != _FIRST:
            down = side == "input_blocks"
            block, i = divmod(int(inside[0]) - down, 3)
            part = _part(int(inside[1]), i, ".".join(inside[2:]))
            found[f"{'down' if down else 'up'}_blocks.{block}.{part}"] = layer
    return found


_FIRST = ("input_blocks", "0")  # the first convolution


def _part(place: int, i: int, rest: str) -> str:
    if rest in ("op", "conv"):
        return f"{'down' if rest == 'op' else 'up'}samplers.0.conv"
    return f"attentions.{i}.{rest}" if place == 1 else f"resnets.{i}.{_RESNET[rest]}"
