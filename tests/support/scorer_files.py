"""Small random scorers in the folders that the published ones come in."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from tests.support.tiny_pipeline import random_params, write_tokenizers
from tlcm_jax.io import names
from tlcm_jax.io.clip_files import clip_shapes
from tlcm_jax.io.clip_names import open_clip_places
from tlcm_jax.io.files import save_tensors
from tlcm_jax.io.json_files import write_json
from tlcm_jax.models.aesthetic import LinearChain
from tlcm_jax.models.blip import BLIPConfig, ImageRewardModel
from tlcm_jax.models.clip import CLIPConfig
from tlcm_jax.models.dinov2 import DINOv2, DINOv2Config
from tlcm_jax.models.inception import FIDInception
from tlcm_jax.models.mps import CrossConfig, MPSModel

# The vocabulary of the tiny pipeline; real CLIPs have 49408.
WORDS = 522
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 28, "layers": 2, "width": 32, "head_width": 8, "mlp_ratio": 2.3,
        "patch_size": 7,
    },
    "text_cfg": {"context_length": 77, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2},
}  # fmt: skip


def open_clip_tensors(params: dict) -> dict[str, np.ndarray]:
    """A tree of `models.clip` under OpenCLIP's names."""
    ours = names.to_torch(params)
    parts: dict[str, list] = {}
    for name, place in open_clip_places(ours).items():
        value = ours[name].T if place.transposed else ours[name]
        parts.setdefault(place.key, []).append((place.part or 0, np.array(value, order="C")))
    return {
        key: found[0][1]
        if len(found) == 1
        else np.concatenate([v for _, v in sorted(found, key=lambda part: part[0])])
        for key, found in parts.items()
    }


def write_clip(folder: Path, *, dialect: str = "open_clip", raw: dict = OPEN_CLIP, seed: int = 0):
    """Writes a CLIP, its config and its tokenizer.

    Args:
      folder: made if it is missing.
      dialect: `open_clip` or `transformers`: whose names and config.
      raw: the architecture as open_clip's configs have it.
      seed: of the weights.

    Returns:
      Its config and its parameters.
    """
    config = CLIPConfig.from_open_clip(raw)
    params = random_params(clip_shapes(config), np.random.default_rng(seed))
    write_tokenizers(folder, ("tokenizer",))
    if dialect == "open_clip":
        write_json(folder / "open_clip_config.json", {"model_cfg": raw, "preprocess_cfg": {}})
        save_tensors(folder / "open_clip_model.safetensors", open_clip_tensors(params))
    else:
        write_json(folder / "config.json", transformers_config(config))
        save_tensors(folder / "model.safetensors", names.to_torch(params))
    return config, params


def transformers_config(config: CLIPConfig) -> dict:
    """A `config.json` of transformers' `CLIPModel`."""
    return {
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "vision_config": vars(config.vision),
        "text_config": {**vars(config.text), "projection_dim": config.projection_dim},
    }


def write_scorers(folder: Path) -> dict[str, Path]:
    """Writes one folder a score, small and random; the folders by the scores' names."""
    for name in ("clip", "pickscore"):
        write_clip(folder / name, dialect="open_clip" if name == "clip" else "transformers")
    write_clip(folder / "hps_v21")
    (folder / "hps_v21" / "open_clip_model.safetensors").rename(
        folder / "hps_v21" / "HPS_v2.1_compressed.safetensors"
    )
    write_clip(folder / "aesthetic" / "clip", dialect="transformers")
    vector = jax.ShapeDtypeStruct((1, OPEN_CLIP["embed_dim"]), np.float32)
    write_network(
        folder / "aesthetic" / "sac+logos+ava1-l14-linearMSE.safetensors", LinearChain(), vector
    )
    config, _ = write_clip(folder / "mps", dialect="transformers")
    pixels = jax.ShapeDtypeStruct((1, 28, 28, 3), np.float32)
    ids = jax.ShapeDtypeStruct((1, 77), np.int32)
    network = MPSModel(config, CrossConfig(layers=1, heads=2, head_width=8))
    write_network(folder / "mps" / "model.safetensors", network, pixels, ids, ids, prefix="mps.")
    write_image_reward(folder / "image_reward")
    write_inception(folder / "fid")
    write_dinov2(folder / "fd_dinov2")
    write_clip(folder / "fd_clip")
    for name in ("fid", "fd_dinov2", "fd_clip"):
        write_images(folder / name / "real")
    return {path.name: path for path in sorted(folder.iterdir())}


def write_inception(folder: Path) -> None:
    """Writes the FID's network at a sixteenth of its widths."""
    folder.mkdir(parents=True)
    images = jax.ShapeDtypeStruct((1, 75, 75, 3), np.float32)
    file = folder / "pt_inception-2015-12-05-6726825d.safetensors"
    params = write_network(file, FIDInception(16), images)
    tensors = names.to_torch(params)
    positive = {k: np.abs(v) + 0.5 for k, v in tensors.items() if k.endswith("running_var")}
    save_tensors(file, tensors | positive)


def write_dinov2(folder: Path) -> None:
    """Writes a DINOv2 of one layer."""
    folder.mkdir(parents=True)
    config = DINOv2Config(hidden_size=64, num_hidden_layers=1, patch_size=2, trained_grid=5)
    images = jax.ShapeDtypeStruct((1, 10, 10, 3), np.float32)
    write_network(folder / "model.safetensors", DINOv2(config), images)


def write_images(folder: Path, count: int = 4, size: tuple[int, int] = (40, 36)) -> None:
    """Writes random pictures, each a little larger than the one before."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (size[0] + i, size[1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_image_reward(folder: Path) -> None:
    """Writes an ImageReward of one layer each, and a vocabulary of letters."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    config = BLIPConfig(
        image_size=32, vision_width=64, vision_layers=1, vocab_size=len(words), positions=40,
        text_width=64, text_inner=48, text_layers=1,
    )  # fmt: skip
    pixels = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    ids = jax.ShapeDtypeStruct((1, 35), np.int32)
    seen = jax.ShapeDtypeStruct((1, 35), bool)
    network = ImageRewardModel(config)
    write_network(folder / "ImageReward.safetensors", network, pixels, ids, seen)


def write_network(
    file: Path, network: nn.Module, *inputs: Any, seed: int = 0, prefix: str = ""
) -> dict:
    """Writes random weights of a network that is called with such inputs; returns them."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    params = random_params(shapes, np.random.default_rng(seed))
    save_tensors(file, {prefix + key: value for key, value in names.to_torch(params).items()})
    return params
