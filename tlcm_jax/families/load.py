"""Reads a pipeline of the Stable Diffusion family: a diffusers folder, a hub id, a single file."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import CLIPTokenizer

from tlcm_jax.diffusion.scheduler_config import process_from_config
from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.io import names
from tlcm_jax.io.placement import Shardings, to_devices, to_host
from tlcm_jax.io.sources import Source
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig

_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")


def load_model(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: str = "none",
    on_device: bool = True,
    shardings: Shardings | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> StableDiffusion:
    """Loads a pipeline, tensor by tensor.

    Args:
      path: a folder with `model_index.json`; a hub id, `ORGANISATION/NAME[@REVISION]`; or a
        single-file checkpoint of SDXL or SD 1.x.
      dtype: compute dtype of every network.
      param_dtype: dtype the weights are kept in; `dtype` by default.
      remat: the UNet's rematerialisation policy.
      on_device: put the weights on devices; otherwise they stay in host memory.
      shardings: where on devices: from the tree of shapes (`LatentModel.params` of
        `abstract_model`) to a tree of shardings. By default all is on the default device.
      variant: read `*.VARIANT.safetensors`, such as fp16; by default the files without one, else
        those of fp16.
      config: a pipeline folder or hub id whose configs and tokenizers a single file goes with. By
        default the folder `config` beside the file, else its family's published ones, from the
        hub.

    Raises:
      FileNotFoundError: the folder, or a part of it, is not there; the message says which.
      ValueError: a config or tensor does not fit, or weights are pickled.
    """
    source = Source.find(path, variant=variant, config=config)
    pipeline = _abstract(source, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat)
    params = {}
    # All are checked before the first is read.
    opened = {}
    for name, shapes in pipeline.params.items():
        tensors = source.component(name, shapes)
        opened[name] = (tensors, names.match_tensors(tensors, shapes, source.label(name)))
    source.check_all_used()
    placed = None if shardings is None else shardings(pipeline.params)
    for name, (tensors, views) in opened.items():
        shapes = pipeline.params[name]
        if on_device:
            where = None if placed is None else placed[name]
            params[name] = to_devices(views, shapes, tensors.release, where)
        else:
            params[name] = to_host(views, shapes, tensors.release)
    tokenizers = ("tokenizer", "tokenizer_2")[: len(pipeline.text_encoders)]
    return dataclasses.replace(
        pipeline,
        params=params,
        tokenizers=tuple(_tokenizer(source.folder / name) for name in tokenizers),
    )


def abstract_model(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
    remat: str = "none",
) -> StableDiffusion:  # fmt: skip
    """The pipeline that a folder's configs describe: shapes for weights, and no tokenizers.

    Args and errors are those of `load_model`.
    """
    source = Source.find(path, weights=False)
    return _abstract(source, dtype=dtype, param_dtype=param_dtype, remat=remat)


def _abstract(source: Source, *, dtype: Any, param_dtype: Any, remat: str) -> StableDiffusion:
    configs = _read_configs(source.folder)
    index = configs["model_index"]
    two_towers = "text_encoder_2" in configs
    unet = UNet2DConditionModel(UNetConfig.from_dict(configs["unet"]), dtype, remat)
    vae = AutoencoderKL(VAEConfig.from_dict(configs["vae"]), dtype)
    towers: dict[str, Any] = {
        name: CLIPTextModel(CLIPTextConfig.from_dict(configs[name]), dtype)
        for name in ("text_encoder", "text_encoder_2")
        if name in configs
    }
    components: dict[str, Any] = {"unet": unet, "vae": vae, **towers}
    return StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoders=tuple(towers.values()),
        tokenizers=(),
        process=process_from_config(configs["scheduler"]),
        params={name: abstract_params(net, param_dtype) for name, net in components.items()},
        configs=configs,
        zero_null=two_towers and index.get("force_zeros_for_empty_prompt", True),
        source=source.name,
        folder=str(source.folder),
    )


def _read_configs(folder: Path) -> dict[str, dict]:
    """Every JSON config of a pipeline folder, by component."""
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        raise ValueError(f"{folder}: pipeline class {kind!r} is not one of {_PIPELINES}")
    towers = ("text_encoder", "text_encoder_2") if kind == _PIPELINES[0] else ("text_encoder",)
    configs = {name: _read_json(folder / name / "config.json") for name in ("unet", "vae", *towers)}
    configs["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    configs["model_index"] = index
    return configs


def abstract_params(network: Any, dtype: Any = jnp.float32) -> dict:
    """A network's parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(dtype)), _parameter_shapes(network)
    )


@functools.lru_cache(maxsize=16)
def _parameter_shapes(network: Any) -> Any:
    """Traces the network's initialisation: seconds, so once for each architecture."""
    config = network.config
    ids = jnp.zeros((1, 8), jnp.int32)

    def init(key: jax.Array) -> Any:
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

    return jax.eval_shape(init, jax.random.key(0))["params"]


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
