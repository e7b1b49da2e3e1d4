"""How LoRA files name layers and their parts: from a file's keys to the network's own paths.

A key is a layer's name and a part's, each of some dialect and year:

| dialect | layer |
|---|---|
| diffusers | `<network>.<path>`; of 2023, `<path>.processor.to_q`, and no network's name |
| kohya, LyCORIS | `lora_<..>_<path, flat>`, also by the single-file checkpoint's path |
| ComfyUI | `diffusion_model.<the single-file checkpoint's path>` |
| PEFT | `base_model.model.<path>`, alone or behind `<network>.` |

A text tower's path may leave out `text_model.`. In flat names an underscore may be a dot or an
underscore; they are resolved through the network's own paths, never by guessing.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from tlcm_jax.io.names import Path_

_PEFT = "base_model.model."
# Each part of a layer's update, and how keys of it end.
_ENDINGS = {
    "lora_A": r"\.lora_A(\.\w+)?\.weight|\.lora_A(\.default)?|\.lora_down\.weight"
    r"|[._]lora\.down\.weight|\.lora_(linear_)?layer\.down\.weight|(?<!lora)\.down\.weight",
    "lora_B": r"\.lora_B(\.\w+)?\.weight|\.lora_B(\.default)?|\.lora_up\.weight"
    r"|[._]lora\.up\.weight|\.lora_(linear_)?layer\.up\.weight|(?<!lora)\.up\.weight",
    "lora_mid": r"\.lora_mid\.weight",
    "alpha": r"([._]lora|\.lora_(linear_)?layer)?\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"[._]lora_magnitude_vector(\.\w+)?(\.weight)?",
    **{
        part: rf"\.{part}(\.default)?"
        for part in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        )
    },
}  # fmt: skip
_KEY = re.compile(
    "(?P<layer>.+?)(?:" + "|".join(f"(?P<{part}>{end})" for part, end in _ENDINGS.items()) + ")"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraNames:
    """How LoRA files name the layers of a model family.

    Attributes:
      backbone: the network that PEFT's files, which name none, are for.
      kohya: how flat names of a network's layers begin, the one that is written first; empty where
        there are no such files.
      dotted: how dotted names of a network's layers may begin, besides `<network>.`.
      converted: the names of the backbone's layers, given all of them, in single-file checkpoints,
        by which files may call them; None where they do not.
    """

    backbone: str
    kohya: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    dotted: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    converted: Callable[[Iterable[str]], Mapping[str, str]] | None = None


def kohya_name(layer: Path_, stem: str) -> str:
    """A layer's name in kohya's dialect, such as `lora_unet_down_blocks_0_resnets_0_conv1`."""
    return stem + "_".join(layer).replace(".", "_")


def split_key(key: str) -> tuple[str, str] | None:
    """The layer that a key names, in whatever dialect, and the part of it; None for no such key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match["layer"], str(match.lastgroup)


def find_parts(
    keys: Iterable[str], layers: Iterable[Path_], naming: LoraNames
) -> tuple[dict[Path_, dict[str, str]], list[str]]:
    """Which of a file's keys hold which part of which layer.

    Where a file holds a layer both by its own path and by the single-file checkpoint's, as some
    do, the former is taken, as diffusers does.

    Args:
      keys: the file's.
      layers: the networks', as paths that begin with the network's name.
      naming: the family's.

    Returns:
      For each layer the key of each part; and the keys that are no part of any layer.

    Raises:
      ValueError: a name that may be two layers, or a part that is there twice.
    """
    named = _layer_names(layers, naming)
    parts: dict[Path_, dict[str, str]] = {}
    second: set[str] = set()  # keys by the single-file checkpoint's names
    strays = []
    for key in keys:
        split = split_key(key)
        found = named.get(split[0], {}) if split else {}
        if split is None or not found:
            strays.append(key)
            continue
        if len(found) > 1:
            options = " and ".join(".".join(layer[1:]) for layer in found)
            raise ValueError(f"{split[0]} may be {options}; convert the file to diffusers' names")
        ((layer, converted),) = found.items()
        there = parts.setdefault(layer, {})
        if converted:
            second.add(key)
        former = there.get(split[1])
        if former is not None and (former in second) == converted:
            raise ValueError(f"{'.'.join(layer[1:])} is there twice, in two dialects")
        if former is None or former in second:
            there[split[1]] = key
    return parts, strays


def _layer_names(layers: Iterable[Path_], naming: LoraNames) -> dict[str, dict[Path_, bool]]:
    """Every name that a layer may have in a file, and whether it is the single-file checkpoint's.

    A name of several layers has several.
    """
    own: dict[str, dict[str, Path_]] = {}
    for layer in layers:
        own.setdefault(layer[0], {})[".".join(layer[1:])] = layer
    found: dict[str, dict[Path_, bool]] = {}
    for network, paths in own.items():
        dotted = (f"{network}.", "", *naming.dotted.get(network, ()))
        dotted = (*dotted, *(prefix + _PEFT for prefix in dotted))
        flat = naming.kohya.get(network, ())
        converted: Mapping[str, str] = {}
        if naming.converted is not None and network == naming.backbone:
            with contextlib.suppress(ValueError):  # there are no such files of this network
                converted = naming.converted(paths)
        for path, layer in paths.items():
            names = dict.fromkeys(_spellings(path), False)
            if path in converted:
                names.setdefault(converted[path], True)
            for name, second in names.items():
                underscored = name.replace(".", "_")
                for full in (*(d + name for d in dotted), *(f + underscored for f in flat)):
                    found.setdefault(full, {}).setdefault(layer, second)
    return found


def _spellings(path: str) -> Iterable[str]:
    """A layer's own dotted name, and those that diffusers and transformers had for it."""
    yield path
    if ".to_" in path:
        former = path.removesuffix(".0") if path.endswith(".to_out.0") else path
        yield former
        yield former.replace(".to_", ".processor.to_")
        yield path.replace(".to_", ".processor.to_")
    for name in (path, path.removeprefix("text_model.")):
        yield name
        # The attention of text towers in diffusers' files of 2023.
        if match := re.fullmatch(r"(.+\.self_attn\.)(q|k|v|out)_proj", name):
            yield f"{match[1]}to_{match[2]}"
