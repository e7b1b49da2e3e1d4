"""Reads a diffusers pipeline folder of the Stable Diffusion family into a `Pipeline`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import CLIPTokenizer

from tlcm_jax.diffusion.schedule import NoiseSchedule
from tlcm_jax.interchange import names
from tlcm_jax.interchange.pipeline import Pipeline
from tlcm_jax.interchange.tensors import open_component, refuse_pickle
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig

_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")


def load_pipeline(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = None, remat: str = "none"
) -> Pipeline:
    """Loads a pipeline folder.

    Args:
      path: a folder with `model_index.json`.
      dtype: compute dtype of every network.
      param_dtype: dtype the weights are kept in; `dtype` by default.
      remat: the UNet's rematerialisation policy.

    Raises:
      FileNotFoundError: the folder, or a part of it, is not there; the message says which.
      ValueError: a config or tensor does not fit, or weights are pickled.
    """
    folder = Path(path)
    if folder.is_file():
        refuse_pickle(folder)
        raise ValueError(f"{folder} is a file; give the diffusers pipeline folder")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model {str(path)!r} is not a folder; give a diffusers pipeline folder "
            "(one that holds model_index.json)"
        )
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        raise ValueError(f"{folder}: pipeline class {kind!r} is not one of {_PIPELINES}")
    two_towers = kind == _PIPELINES[0]
    towers = ("text_encoder", "text_encoder_2") if two_towers else ("text_encoder",)
    tokenizers = ("tokenizer", "tokenizer_2") if two_towers else ("tokenizer",)
    configs = {
        name: _read_json(folder / name / "config.json") for name in ("unet", "vae", *towers)
    }
    configs["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    configs["model_index"] = index

    unet = UNet2DConditionModel(UNetConfig.from_dict(configs["unet"]), dtype, remat)
    vae = AutoencoderKL(VAEConfig.from_dict(configs["vae"]), dtype)
    text_encoders = tuple(
        CLIPTextModel(CLIPTextConfig.from_dict(configs[name]), dtype) for name in towers
    )
    networks = {"unet": unet, "vae": vae, **dict(zip(towers, text_encoders, strict=True))}
    params = {}
    for name, network in networks.items():
        stem = "model" if name in towers else "diffusion_pytorch_model"
        shapes = abstract_params(network, param_dtype or dtype)
        params[name] = names.from_torch(
            open_component(folder / name, stem), shapes, str(folder / name)
        )
    return Pipeline(
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tuple(_tokenizer(folder / name) for name in tokenizers),
        schedule=NoiseSchedule.from_config(configs["scheduler"]),
        params=jax.tree.map(jnp.asarray, params),
        configs=configs,
        zero_null=two_towers and index.get("force_zeros_for_empty_prompt", True),
        source=str(path),
    )


def abstract_params(network: Any, dtype: Any = jnp.float32) -> dict:
    """A network's parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    config = network.config
    ids = jnp.zeros((1, 8), jnp.int32)

    def init(key: jax.Array) -> dict:
        if isinstance(network, UNet2DConditionModel):
            text = jnp.zeros((1, 8, config.cross_attention_dim))
            sample = jnp.zeros((1, 16, 16, config.in_channels))
            width = config.time_cond_proj_dim
            cond = jnp.zeros((1, width)) if width else None
            if not config.text_time:
                return network.init(key, sample, ids[:, 0], text, timestep_cond=cond)
            size = config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - 6 * size
            return network.init(
                key, sample, ids[:, 0], text, jnp.zeros((1, pooled)), jnp.zeros((1, 6)), cond
            )
        if isinstance(network, AutoencoderKL):
            side = 2 * config.downsampling
            return network.init(key, jnp.zeros((1, side, side, config.in_channels)))
        return network.init(key, ids)

    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(dtype)), shapes)


def _read_json(path: Path) -> dict:
    """One JSON object of the folder.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the model folder is not whole")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder; its files are read as data, from disk only."""
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vocab.json; the model folder is not whole")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.model_max_length > 77:  # transformers' "unknown" is a huge number
        tokenizer.model_max_length = 77
    return tokenizer
