"""Reading LoRA files: diffusers/PEFT, kohya, and PEFT adapter folders.

A file stores factors A and B and, per layer or in its header, alpha; the update is
(alpha / r) B A. In memory an adapter is already scaled: alpha / r is folded into `lora_B`
(`models.lora.scaled`). What is written has it folded in too, so alpha = r and every reader's own
scale is 1.

| dialect | names |
|---|---|
| diffusers | `<network>.<path>.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]` |
| kohya | `lora_<..>_<path, dots as underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha` |
| PEFT folder | `base_model.model.<path>.lora_A.weight`, alpha in `adapter_config.json` |

A network is called by its component's name, `<network>`; how kohya's files call it, and whether
there are such files, is the family's to say (`LoraNames`).

Convolutions are `[r, in, kh, kw]` and `[out, r, 1, 1]`. In kohya's names an underscore may be a
dot or an underscore; they are resolved through the network's own module paths. For SDXL kohya's
own trainer names layers as single-file checkpoints do (`lora_unet_input_blocks_4_1_...`), and so
may a file here. Diffusers' former `.lora.down.weight` and PEFT's `.lora_A.default.weight` are read
too.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from tlcm_jax.io import names
from tlcm_jax.io.json_files import read_object
from tlcm_jax.io.names import Path_
from tlcm_jax.io.tensors import TensorFile, refuse_pickle

# The names that diffusers' and PEFT's loaders look for in a folder.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_A.default.weight": "lora_A",
    ".lora_B.default.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".alpha": "alpha",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraNames:
    """How LoRA files name the layers of a model family.

    Attributes:
      backbone: the network that PEFT's files, which name none, are for.
      kohya: how kohya's names of a network's layers begin, the one that is written first; empty
        where there are no such files.
      converted: the names of the backbone's layers, given all of them, in single-file checkpoints,
        by which kohya's files may call them; None where they do not.
      converted_stems: how the converted names begin, and no other layer's.
    """

    backbone: str
    kohya: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    converted: Callable[[Iterable[str]], Mapping[str, str]] | None = None
    converted_stems: tuple[str, ...] = ()


def read_lora(path: str | Path, backbone: Mapping[str, Any], naming: LoraNames) -> dict:
    """Reads a LoRA of the backbone alone.

    Args:
      path: as of `read_networks`.
      backbone: its parameter tree (arrays or shapes), which says what layers there are.
      naming: the family's.

    Returns:
      The adapter, float32 numpy arrays, scaled: fit for `LatentModel.denoiser(lora=...)`.

    Raises:
      FileNotFoundError, ValueError: as of `read_networks`; layers of text encoders match nothing.
    """
    return read_networks(path, {naming.backbone: backbone}, naming)[naming.backbone]


def read_networks(
    path: str | Path, networks: Mapping[str, Any], naming: LoraNames
) -> dict[str, dict]:
    """Reads a LoRA of any dialect.

    Args:
      path: a safetensors file, a PEFT adapter folder, or a folder as diffusers'
        `save_lora_weights` writes it.
      networks: parameter trees (arrays or shapes), which say what layers there are, by the names
        of the components.
      naming: the family's.

    Returns:
      The adapters of those networks that the file adapts, by their names: float32 numpy arrays,
      scaled, fit for `models.lora.merge`.

    Raises:
      FileNotFoundError: there is no such file, or the folder holds no LoRA.
      ValueError: a pickle, a broken file, a key that matches no layer (the first ten are named),
        half a layer, factors that do not fit the layer, or an unsupported variant.
    """
    file, config = _locate(Path(path))
    tensors = TensorFile([file])
    scales = {name: _scales(file, tensors.metadata, config, name) for name in networks}
    kernels = {
        (name, *layer[:-1]): tuple(leaf.shape)
        for name, tree in networks.items()
        for layer, leaf in flax.traverse_util.flatten_dict(tree).items()
        if layer[-1] == "kernel"
    }
    parts = _resolve(tensors, kernels, naming, file)
    adapter: dict[Path_, np.ndarray] = {}
    problems = []
    for layer, keys in parts.items():
        network, name = layer[0], ".".join(layer[1:])
        if "lora_A" not in keys or "lora_B" not in keys:
            problems.append(f"{name} has only {', '.join(sorted(keys))}")
            continue
        down, up = (
            names.to_flax_layout(("kernel",), np.array(tensors[keys[which]], np.float32))
            for which in ("lora_A", "lora_B")
        )
        if not _fits(down.shape, up.shape, kernels[layer]):
            problems.append(
                f"{name} has factors {tensors[keys['lora_A']].shape} and "
                f"{tensors[keys['lora_B']].shape} for a kernel {kernels[layer]}"
            )
            continue
        rank = down.shape[-1]
        if "alpha" in keys:
            scale = float(np.asarray(tensors[keys["alpha"]], np.float32).reshape(-1)[0]) / rank
        else:
            scale = scales[network](name, rank)
        if not (np.isfinite(scale) and np.all(np.isfinite(down)) and np.all(np.isfinite(up))):
            problems.append(f"{name} holds values that are not finite")
            continue
        adapter[(*layer, "lora_A")] = np.ascontiguousarray(down)
        adapter[(*layer, "lora_B")] = np.ascontiguousarray(up * np.float32(scale))
    names.raise_if(problems, f"{file} does not fit this model")
    return flax.traverse_util.unflatten_dict(adapter)


def kohya_name(layer: Path_, stem: str) -> str:
    """A layer's name in kohya's dialect, such as `lora_unet_down_blocks_0_resnets_0_conv1`."""
    return stem + "_".join(layer).replace(".", "_")


def _locate(path: Path) -> tuple[Path, dict | None]:
    """The safetensors file, and the PEFT config if it is an adapter folder."""
    if path.is_file():
        refuse_pickle(path)
        return path, None
    if not path.is_dir():
        raise FileNotFoundError(f"LoRA {str(path)!r} does not exist; give a safetensors file")
    if (path / PEFT_CONFIG).is_file():
        if not (path / PEFT_FILE).is_file():
            for other in sorted(path.iterdir()):
                refuse_pickle(other)
            raise FileNotFoundError(f"{path} holds no {PEFT_FILE}; the adapter folder is not whole")
        return path / PEFT_FILE, _read_config(path / PEFT_CONFIG)
    if (path / DIFFUSERS_FILE).is_file():
        return path / DIFFUSERS_FILE, None
    for other in sorted(path.iterdir()):
        refuse_pickle(other)
    inside = sorted(str(found.parent) for found in path.glob(f"**/{PEFT_CONFIG}"))
    raise FileNotFoundError(
        f"{path} holds neither {PEFT_CONFIG} nor {DIFFUSERS_FILE}; give "
        + (f"a folder that does: {', '.join(inside[:10])}" if inside else "the safetensors file")
    )


def _read_config(path: Path) -> dict:
    config = read_object(path)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"{path} does not describe a LoRA (peft_type)")
    return config


def _scales(
    file: Path, metadata: Mapping[str, str], config: Mapping[str, Any] | None, network: str
) -> Callable[[str, int], float]:
    """The scale of a network's layer without an alpha tensor: `(name, rank) -> alpha / rank`."""
    if config is None:
        stored = metadata.get("lora_adapter_metadata")
        if stored is None:
            return lambda name, rank: 1.0
        try:
            config = json.loads(stored)
            config = {k.removeprefix(f"{network}."): v for k, v in config.items()}
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{file}: its lora_adapter_metadata is not a JSON object") from None
    for variant in ("use_dora", "fan_in_fan_out"):
        if config.get(variant):
            raise ValueError(f"{file}: adapters with {variant} are not supported")
    try:
        default = float(config.get("lora_alpha", 8))  # PEFT's own default
        alphas = {k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()}
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{file}: lora_alpha and alpha_pattern must hold numbers") from None
    patterns = {_literal(key, file): alpha for key, alpha in alphas.items()}
    root = math.sqrt if config.get("use_rslora") else float

    def scale(name: str, rank: int) -> float:
        for pattern, alpha in patterns.items():
            if name == pattern or name.endswith("." + pattern):
                return alpha / root(rank)
        return default / root(rank)

    return scale


def _literal(pattern: str, file: Path) -> str:
    """A PEFT pattern that is a plain name; regular expressions of a file are not run."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not name.replace(".", "").replace("_", "").isalnum():
        raise ValueError(f"{file}: alpha_pattern {pattern!r} is not a plain layer name")
    return name


def _resolve(
    tensors: Mapping[str, np.ndarray],
    kernels: Mapping[Path_, tuple],
    naming: LoraNames,
    file: Path,
) -> dict[Path_, dict[str, str]]:
    """For each layer, the file's key of `lora_A`, `lora_B` and, where there is one, `alpha`.

    Layers are paths that begin with their network's name.
    """
    dotted = {".".join(layer): layer for layer in kernels}
    flat: dict[str, list[Path_]] = {}
    for layer in kernels:
        for stem in naming.kohya.get(layer[0], ()):
            flat.setdefault(kohya_name(layer[1:], stem), []).append(layer)
    if naming.converted and any(key.startswith(naming.converted_stems) for key in tensors):
        own = {".".join(layer[1:]): layer for layer in kernels if layer[0] == naming.backbone}
        stem = naming.kohya[naming.backbone][0]
        for name, converted in naming.converted(own).items():
            flat.setdefault(kohya_name((converted,), stem), []).append(own[name])
    stems = tuple(stem for stems in naming.kohya.values() for stem in stems)
    parts: dict[Path_, dict[str, str]] = {}
    problems = []
    for key in tensors:
        suffix = next((s for s in _PARTS if key.endswith(s)), "")
        stem = key.removesuffix(suffix)
        if stem.startswith(stems):
            found = flat.get(stem, [])
        else:
            # PEFT's prefix alone is the backbone's; diffusers may have put a network's before it.
            network, prefix, rest = stem.partition("base_model.model.")
            name = (network or f"{naming.backbone}.") + rest if prefix else stem
            found = [dotted[name]] if name in dotted else []
        if not suffix or not found:
            problems.append(key)
        elif len(found) > 1:
            named = " and ".join(".".join(layer[1:]) for layer in found)
            raise ValueError(f"{file}: {stem} may be {named}; convert the file to diffusers' names")
        elif _PARTS[suffix] in parts.setdefault(found[0], {}):
            raise ValueError(f"{file} holds {'.'.join(found[0][1:])} twice, in two dialects")
        else:
            parts[found[0]][_PARTS[suffix]] = key
    networks = dict.fromkeys(layer[0] for layer in kernels)
    names.raise_if(problems, f"{file}: keys that match no layer of {', '.join(networks)}")
    if not parts:
        raise ValueError(f"{file} holds no LoRA")
    return parts


def _fits(down: tuple, up: tuple, kernel: tuple) -> bool:
    """Whether factors in Flax layout are a low-rank update of the kernel."""
    ones = (1,) * (len(kernel) - 2)
    rank = down[-1]
    return down[:-1] == kernel[:-1] and up == (*ones, rank, kernel[-1]) and rank > 0
