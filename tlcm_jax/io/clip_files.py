"""CLIP as its users have it: a hub folder of transformers' or open_clip's, or one safetensors."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tlcm_jax.io import names
from tlcm_jax.io.clip_names import is_open_clip, open_clip_places
from tlcm_jax.io.json_files import parse, read_object
from tlcm_jax.io.placement import to_host
from tlcm_jax.io.places import PlacedTensors
from tlcm_jax.io.scorer_files import Published, open_weights
from tlcm_jax.io.tensors import TensorFile, Tensors
from tlcm_jax.models.clip import ARCHITECTURES, CLIPConfig, CLIPModel

FILES = ("open_clip_model", "open_clip_pytorch_model", "model")


def load_clip(
    scorer: str, path: str | Path, architecture: str, published: Published
) -> tuple[CLIPModel, Any, Path]:
    """Loads a CLIP.

    Args:
      scorer: who asks, for messages.
      path: a safetensors file or a folder. A config beside the weights (`open_clip_config.json`,
        or transformers' `config.json`) says their sizes; without one they are `architecture`'s.
      architecture: the published one that the score is defined by, a key of `ARCHITECTURES`.
      published: the weights looked for.

    Returns:
      The module, its float32 parameters on the host, and the folder of the weights.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: the file holds another published architecture, or does not fit its config.
    """
    tensors, folder = open_weights(scorer, path, published)
    config = read_clip_config(folder) or ARCHITECTURES[architecture]
    _check(scorer, str(path), config, architecture)
    network = CLIPModel(config)
    shapes = clip_shapes(config)
    placed = _placed(tensors, names.to_torch_names(shapes))
    _check_sizes(scorer, str(path), placed, config)
    views = names.match_tensors(placed, shapes, str(path))
    return network, to_host(views, shapes, tensors.release), folder


def clip_shapes(config: CLIPConfig) -> Any:
    """The parameters' tree of `jax.ShapeDtypeStruct`."""
    side = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, config.text.max_position_embeddings), jnp.int32)
    return jax.eval_shape(CLIPModel(config).init, jax.random.key(0), pixels, ids)["params"]


def read_clip_config(folder: Path) -> CLIPConfig | None:
    """What the weights' own config says, if they have one."""
    if (file := folder / "open_clip_config.json").is_file():
        return parse(file, read_object(file), CLIPConfig.from_open_clip)
    if (file := folder / "config.json").is_file() and "vision_config" in (raw := read_object(file)):
        return parse(file, raw, CLIPConfig.from_transformers)
    return None


def _placed(tensors: TensorFile, wanted: list[str]) -> Tensors:
    if not is_open_clip(tensors):
        return tensors
    # A mask that some files store is no weight.
    return PlacedTensors(tensors, open_clip_places(wanted), left_out=lambda key: key == "attn_mask")


def _check(scorer: str, path: str, config: CLIPConfig, architecture: str) -> None:
    """Raises a ValueError if a config is another published architecture's."""
    for name, known in ARCHITECTURES.items():
        if config == known and name != architecture:
            raise ValueError(f"{path} is {name}, but score {scorer!r} is {architecture}'s")


def _check_sizes(scorer: str, path: str, tensors: Tensors, config: CLIPConfig) -> None:
    """Raises a ValueError if a file's sizes are another published architecture's."""

    def sizes(config: CLIPConfig) -> tuple[int, int, int]:
        vision = config.vision
        positions = 1 + (vision.image_size // vision.patch_size) ** 2
        return vision.hidden_size, positions, config.text.hidden_size

    try:
        rows, width = tensors["vision_model.embeddings.position_embedding.weight"].shape
        text = tensors["text_model.embeddings.token_embedding.weight"].shape[1]
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{path} holds no CLIP, which score {scorer!r} needs") from None
    if (width, rows, text) == sizes(config):
        return
    known = [name for name, each in ARCHITECTURES.items() if sizes(each) == (width, rows, text)]
    raise ValueError(
        f"{path} holds {known[0] if known else f'a CLIP {width} and {text} wide'}, not the network "
        f"that score {scorer!r} needs ({config.vision.hidden_size} and {config.text.hidden_size} "
        "wide)"
    )
