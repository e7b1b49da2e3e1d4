"""Finding and reading the published weights of scorers, and saying what is missing or wrong.

A scorer's PATH is a safetensors file, or the folder it lies in as its hub repository has it. What
is missing is named with where to get it, before anything else is loaded.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from transformers import CLIPTokenizer

from tlcm_jax.data.tokens import read_tokenizer
from tlcm_jax.io import buckets, names
from tlcm_jax.io.placement import check_finite, to_host
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
    where = buckets.local(path)
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
    shapes = _shapes(network, inputs, source)
    return to_host(names.match_tensors(tensors, shapes, source), shapes, tensors.release)


def _shapes(network: nn.Module, inputs: tuple, source: str) -> Any:
    try:
        return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    except Exception as error:  # whatever sizes that do not fit raise, and where
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} describes no network ({reason})") from None


def read_own(tensors: TensorFile, network: nn.Module, inputs: tuple, source: str) -> Any:
    """Parameters, float32, of a file that has them under the tree's own paths, `a/b/kernel`.

    Args and errors are `read_params`'s.
    """
    shapes = _shapes(network, inputs, source)
    wanted = flax.traverse_util.flatten_dict(shapes, sep="/")
    wrong = [
        name for name in sorted(wanted.keys() | set(tensors))
        if name not in wanted or name not in tensors or tensors[name].shape != wanted[name].shape
        or tensors[name].dtype.kind in "iub"
    ]  # fmt: skip
    names.raise_if(wrong, f"{source} does not fit its config")
    floats = {}
    for name in wanted:
        check_finite(name, tensors[name])
        floats[name] = np.array(tensors[name], np.float32)
    return flax.traverse_util.unflatten_dict(floats, sep="/")


def clip_tokenizer(scorer: str, folder: Path, origin: str, vocabulary: int) -> CLIPTokenizer:
    """CLIP's tokenizer, from the folder of a scorer's weights or `tokenizer` in it.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it cannot be read, or is another network's.
    """
    for place in (folder, folder / "tokenizer"):
        if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
            return read_tokenizer(place, vocabulary)
    raise FileNotFoundError(
        f"the tokenizer of score {scorer!r} is missing: put vocab.json and merges.txt of {origin}, "
        f"or of any CLIP (SDXL's folder tokenizer), into {folder / 'tokenizer'}"
    )
