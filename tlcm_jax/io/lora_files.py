"""Reading LoRA files of every dialect (`io.lora_names`) and kind (`io.lora_algebra`).

A file stores factors A and B and, per layer or in its header, alpha; the update is
(alpha / r) B A. In memory an adapter is already scaled: alpha / r is folded into `lora_B`
(`models.lora.scaled`). Updates that are not of low rank are kept as they are stored, to be added to
the weights (`io.lora_stack`).

Alpha is, in this order: a layer's own tensor; in PEFT's `adapter_config.json`, or diffusers'
`lora_adapter_metadata` in the header; r, for a scale of 1.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from absl import logging

from tlcm_jax.io import lora_algebra, names
from tlcm_jax.io.lora_kinds import describe, other_family
from tlcm_jax.io.lora_names import LoraNames, find_parts
from tlcm_jax.io.lora_sources import PEFT_CONFIG, find_lora
from tlcm_jax.io.names import Path_
from tlcm_jax.io.tensors import TensorFile

_READ = "LoRA, DoRA, LoCon, LoHa and LoKr are read"
# Embeddings that some trainers put beside the LoRA they go with.
_BESIDE = "bundle_emb."
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")
# PEFT's ways of starting that change the weights which the adapter is then trained on.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseUpdate:
    """A layer's update that is no product of two factors: DoRA, LoHa, LoKr.

    Attributes:
      parts: the file's tensors by `lora_algebra`'s names, float32, in PyTorch's layout.
      scale: alpha / r.
      label: file and layer, for messages.
    """

    parts: Mapping[str, np.ndarray]
    scale: float
    label: str

    def delta(self, kernel: Any) -> np.ndarray:
        """What is added to a Flax kernel: float32, of its shape.

        Raises:
          ValueError: the parts do not fit it, or the result is not finite.
        """
        weight = names.to_torch_layout(("kernel",), np.asarray(kernel, np.float32))
        try:
            change = lora_algebra.delta(self.parts, self.scale, weight)
        except ValueError as error:
            raise ValueError(f"{self.label} {error}") from None
        if not np.all(np.isfinite(change)):
            raise ValueError(f"{self.label} holds values that are not finite")
        return names.to_flax_layout(("kernel",), change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a file changes.

    Attributes:
      adapters: of the networks that it adapts by low-rank updates, by their names: float32 numpy
        arrays, scaled, fit for `models.lora.merge`.
      dense: updates of the other layers, by paths that begin with the network's name.
    """

    adapters: Mapping[str, dict]
    dense: Mapping[Path_, DenseUpdate]


def read_lora(path: str | Path, backbone: Mapping[str, Any], naming: LoraNames) -> dict:
    """Reads a low-rank LoRA of the backbone alone.

    Args:
      path: as of `read_networks`.
      backbone: its parameter tree (arrays or shapes), which says what layers there are.
      naming: the family's.

    Returns:
      The adapter, float32 numpy arrays, scaled: fit for `LatentModel.denoiser(lora=...)`.

    Raises:
      FileNotFoundError, ValueError: as of `read_networks`; layers of text encoders match nothing.
    """
    found = read_networks(path, {naming.backbone: backbone}, naming)
    if found.dense:
        raise ValueError(f"{path} holds updates that are not of low rank; merge them into a model")
    return found.adapters[naming.backbone]


def read_networks(path: str | Path, networks: Mapping[str, Any], naming: LoraNames) -> LoraFile:
    """Reads a LoRA of any dialect and kind.

    Args:
      path: a safetensors file, a PEFT adapter folder, a folder as diffusers' `save_lora_weights`
        writes it, or on the hub `OWNER/NAME[@REVISION][:FILE]`.
      networks: parameter trees (arrays or shapes), which say what layers there are, by the names
        of the components.
      naming: the family's.

    Raises:
      FileNotFoundError: there is no such file, or the folder holds no LoRA.
      ValueError: a pickle, a broken file, another kind of file (which is named), a key that
        matches no layer (the first ten are named), half a layer, or parts that do not fit it.
    """
    file, config = find_lora(path)
    tensors = TensorFile([file])
    kernels = {
        (name, *layer[:-1]): tuple(leaf.shape)
        for name, tree in networks.items()
        for layer, leaf in flax.traverse_util.flatten_dict(tree).items()
        if layer[-1] == "kernel"
    }
    if config is not None:
        _check_config(file.parent / PEFT_CONFIG, config)
    try:
        keys, strays = find_parts(tensors, kernels, naming)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    _check_strays(file, tensors, strays, kernels)
    scales = {name: _scales(file, tensors.metadata, config, name, naming) for name in networks}
    adapter: dict[Path_, np.ndarray] = {}
    dense: dict[Path_, DenseUpdate] = {}
    problems = []
    for layer, found in keys.items():
        network, name = layer[0], ".".join(layer[1:])
        whole = [k for p, k in found.items() if p != "alpha" and not _is_float(tensors[k])]
        if whole:
            problems.append(f"{whole[0]} is of {tensors[whole[0]].dtype}, quantised?")
            continue
        parts = {part: np.array(tensors[key], np.float32) for part, key in found.items()}
        alpha = parts.pop("alpha", None)
        if missing := lora_algebra.lacks(parts):
            problems.append(f"{name} has only {', '.join(sorted(found))}, no {missing[0]}")
            continue
        rank = lora_algebra.rank(parts)
        if alpha is None:
            scale = scales[network](name, rank)
        elif alpha.size == 1:
            # LyCORIS' files of LoKr that show no rank have a scale of 1.
            scale = float(alpha.reshape(())) / rank if rank else 1.0
        else:
            problems.append(f"{name} has an alpha of shape {alpha.shape}")
            continue
        if not all(np.all(np.isfinite(value)) for value in (*parts.values(), np.asarray(scale))):
            problems.append(f"{name} holds values that are not finite")
            continue
        if not lora_algebra.is_low_rank(parts):
            dense[layer] = DenseUpdate(parts=parts, scale=scale, label=f"{file}: {name}")
            continue
        shape = _torch_shape(kernels[layer])
        try:
            down, up = lora_algebra.factors(parts, shape)
        except ValueError as error:
            problems.append(f"{name} {error}")
            continue
        adapter[(*layer, "lora_A")] = names.to_flax_layout(("kernel",), down)
        adapter[(*layer, "lora_B")] = names.to_flax_layout(("kernel",), up * np.float32(scale))
    if problems and (kind := _other_family(tensors, kernels)):
        raise ValueError(f"{file} is {kind}, which this model is not")
    names.raise_if(problems, f"{file} does not fit this model")
    contiguous = {path: np.ascontiguousarray(value) for path, value in adapter.items()}
    return LoraFile(adapters=flax.traverse_util.unflatten_dict(contiguous), dense=dense)


def _check_strays(
    file: Path, tensors: TensorFile, strays: list[str], kernels: Mapping[Path_, tuple]
) -> None:
    """Refuses a file with keys of no layer, or with nothing else, as what it is."""
    if beside := [key for key in strays if key.startswith(_BESIDE)]:
        logging.warning("%s: left out %d tensors of embeddings beside it", file, len(beside))
        strays = [key for key in strays if key not in beside]
    if not strays and len(beside) < len(tensors):
        return
    if kind := _other_family(tensors, kernels) or describe(strays):
        raise ValueError(f"{file} is {kind}; {_READ}, of this model's layers ({strays[0]})")
    if not any("lora" in key or "lokr" in key or "hada" in key for key in tensors):
        raise ValueError(f"{file} holds no LoRA; {_READ}")
    networks = ", ".join(dict.fromkeys(layer[0] for layer in kernels))
    names.raise_if(strays, f"{file}: keys that match no layer of {networks}")


def _other_family(tensors: TensorFile, kernels: Mapping[Path_, tuple]) -> str | None:
    widths = {shape[0] for layer, shape in kernels.items() if layer[-2:] == ("attn2", "to_k")}
    networks = {layer[0] for layer in kernels}
    return other_family(
        {key: tensors[key].shape for key in tensors},
        min(widths, default=None),
        sum(name.startswith("text_encoder") for name in networks) if len(networks) > 1 else 2,
    )


def _is_float(value: np.ndarray) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _torch_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a Flax kernel's weight in PyTorch's layout."""
    return (kernel[-1], kernel[-2], *kernel[:-2])


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses PEFT's adapters of other kinds, and those that belong to other weights."""
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind not in _PEFT_TYPES:
        raise ValueError(f"{path} describes an adapter of kind {kind} (peft_type); {_READ}")
    start = str(config.get("init_lora_weights")).lower()
    if any(name in start for name in _OTHER_BASE):
        raise ValueError(
            f"{path}: an adapter begun by {start!r} goes with weights that are not the model's; "
            "save it with `path_initial_model_for_weight_conversion`"
        )
    for key in ("fan_in_fan_out", "lora_bias", "modules_to_save", "use_qalora"):
        if config.get(key):
            raise ValueError(f"{path}: adapters with {key} are not supported")


def _scales(
    file: Path, metadata: Mapping[str, str], config: Mapping[str, Any] | None, network: str,
    naming: LoraNames,
) -> Callable[[str, int | None], float]:  # fmt: skip
    """The scale of a network's layer without an alpha tensor: `(name, rank) -> alpha / rank`."""
    if config is None:
        stored = metadata.get("lora_adapter_metadata")
        if stored is None:
            return lambda name, rank: 1.0
        try:
            found = json.loads(stored)
            config = {
                key.removeprefix(f"{network}."): value
                for key, value in found.items()
                if key.startswith(f"{network}.") or (network == naming.backbone and "." not in key)
            }
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{file}: its lora_adapter_metadata is not a JSON object") from None
        if not config:  # the header speaks of other networks
            return lambda name, rank: 1.0
        _check_config(file, config)
    lora = str(config.get("peft_type", "LORA")).upper() == "LORA"
    try:
        default = float(config.get("lora_alpha" if lora else "alpha") or 8)  # PEFT's own default
        alphas = {k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()}
        ranks = {k: int(v) for k, v in (config.get("rank_pattern") or {}).items()}
        usual = int(config.get("r") or 8)
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise ValueError(
            f"{file}: r, alpha and their patterns must hold numbers in its PEFT config"
        ) from None
    root = math.sqrt if config.get("use_rslora") else float

    def scale(name: str, rank: int | None) -> float:
        # What LoKr stores may not show its rank.
        shown = rank if lora and rank is not None else _of_pattern(ranks, name, usual, file)
        return _of_pattern(alphas, name, default, file) / root(shown)

    return scale


def _of_pattern(patterns: Mapping[str, Any], name: str, default: Any, file: Path) -> Any:
    """A layer's value in one of PEFT's patterns that are plain names.

    Regular expressions of a file are not run.
    """
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not literal.replace(".", "").replace("_", "").isalnum():
            raise ValueError(f"{file}: pattern {pattern!r} is not a plain layer name")
        if name == literal or name.endswith("." + literal):
            return value
    return default
