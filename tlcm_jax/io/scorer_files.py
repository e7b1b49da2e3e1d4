"""Finding and reading the published weights of scorers, and saying what is missing or wrong.

A scorer's PATH is a safetensors file, or the folder it lies in as its hub repository has it. What
is missing is named with where to get it, before anything else is loaded.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from transformers import CLIPTokenizer

from tlcm_jax.io import names
from tlcm_jax.io.placement import to_host
from tlcm_jax.io.tensors import TensorFile, Tensors, open_component, refuse_pickle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Weights as they are published.

    Attributes:
      files: their names in a folder, in the order in which they are looked for, without
        `.safetensors`.
      origin: where they are to be had.
      convert: the published file is a pickle, to be converted first.
    """

    files: tuple[str, ...]
    origin: str
    convert: bool = False


def open_weights(scorer: str, path: str | Path, published: Published) -> tuple[TensorFile, Path]:
    """Opens a scorer's weights.

    Args:
      scorer: its name, for messages.
      path: a safetensors file or a folder.
      published: what is looked for in a folder.

    Returns:
      The tensors, and the folder they lie in.

    Raises:
      FileNotFoundError: there are none; the message names their origin and their place.
      ValueError: there are only pickled ones, or the file is broken.
    """
    where = Path(path)
    if str(path) and where.is_file():
        refuse_pickle(where)
        return TensorFile([where]), where.parent
    if str(path) and where.is_dir():
        there = {file.name for file in where.iterdir()}
        for stem in published.files:
            if {f"{stem}.safetensors", f"{stem}.safetensors.index.json"} & there:
                return open_component(where, stem), where
        for name in sorted(there):
            if name.rsplit(".", 1)[0] in (*published.files, "pytorch_model"):
                refuse_pickle(where / name)
    given = f"none in {where}" if str(path) else f"give --scores {scorer}=PATH"
    raise FileNotFoundError(
        f"the weights of score {scorer!r} are missing ({given}): fetch {published.files[0]}"
        f"{' (a pickle, to convert once)' if published.convert else '.safetensors'} from "
        f"{published.origin} and put {published.files[0]}.safetensors there"
    )


def read_params(tensors: Tensors, network: nn.Module, inputs: tuple, source: str) -> Any:
    """A network's parameters, on the host, in the dtype that the network keeps them in.

    Args:
      tensors: under the network's own names.
      network: the module.
      inputs: `jax.ShapeDtypeStruct`s that it is called with.
      source: what the tensors came from, for errors.

    Raises:
      ValueError: a tensor is missing, left over or misshaped; the first ten are named.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    return to_host(names.match_tensors(tensors, shapes, source), shapes, tensors.release)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; a ValueError that names the file if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def clip_tokenizer(scorer: str, folder: Path, origin: str) -> CLIPTokenizer:
    """CLIP's tokenizer, from the folder of a scorer's weights or `tokenizer` in it.

    Raises:
      FileNotFoundError: there is none.
    """
    for place in (folder, folder / "tokenizer"):
        if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
            return CLIPTokenizer.from_pretrained(str(place), local_files_only=True)
    raise FileNotFoundError(
        f"the tokenizer of score {scorer!r} is missing: put vocab.json and merges.txt of {origin}, "
        f"or of any CLIP (SDXL's folder tokenizer), into {folder / 'tokenizer'}"
    )
