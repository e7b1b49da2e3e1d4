"""Reads a model: a pipeline folder, a hub id, a single file, of any family in the table."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tlcm_jax.families.base import LatentModel
from tlcm_jax.io import names
from tlcm_jax.io.checkpoint_kinds import describe_keys
from tlcm_jax.io.pipeline_index import read_index
from tlcm_jax.io.placement import Shardings, to_devices, to_host
from tlcm_jax.io.sources import SingleFile, Source
from tlcm_jax.io.tensors import TensorFile

_STABLE_DIFFUSION = "tlcm_jax.families.stable_diffusion:StableDiffusion"
# The family of each pipeline class that `model_index.json` may name, as `module:class`. A family
# is added by a line; what is imported is never named by a model's files. Here: the pipelines of
# Stable Diffusion's text-to-image networks, whatever they do with them.
FAMILIES: dict[str, str] = {
    "LatentConsistencyModelImg2ImgPipeline": _STABLE_DIFFUSION,
    "LatentConsistencyModelPipeline": _STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": _STABLE_DIFFUSION,
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionKDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionPAGPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLInpaintPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLKDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLPAGPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": _STABLE_DIFFUSION,
}


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
    vae: str | Path | None = None,
) -> LatentModel:
    """Loads a model, tensor by tensor.

    Args:
      path: a folder with `model_index.json`; a hub id, `ORGANISATION/NAME[@REVISION]`; or a
        single-file checkpoint (of SDXL, SD 1.x or SD 2.x).
      dtype: compute dtype of every network.
      param_dtype: dtype the weights are kept in; `dtype` by default.
      remat: the backbone's rematerialisation policy.
      on_device: put the weights on devices; otherwise they stay in host memory.
      shardings: where on devices: from the tree of shapes (`LatentModel.params` of
        `abstract_model`) to a tree of shardings. By default all is on the default device.
      variant: read `*.VARIANT.safetensors`, such as fp16; by default the files without one, else
        those of fp16.
      config: a pipeline folder or hub id whose configs and tokenizers a single file goes with. By
        default the folder `config` beside the file, else its family's published ones, from the
        hub.
      vae: where another autoencoder than the model's is, or that of a file without one.

    Raises:
      FileNotFoundError: the folder, or a part of it, is not there; the message says which.
      ValueError: a config or tensor does not fit, a weight is not a finite number, or weights are
        pickled.
    """
    source = Source.find(path, _open_file, variant=variant, config=config)
    if vae is not None:
        family = _family_of(source)
        source = dataclasses.replace(source, parts={family.decoder: family.open_decoder(vae)})
    model = _abstract(source, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat)
    # All are checked before the first is read.
    opened = {}
    for name, shapes in model.params.items():
        tensors = model.open_component(source, name)
        views = names.match_tensors(tensors, shapes, source.label(name), leave_strays=True)
        opened[name] = (tensors, views)
    source.check_all_used()
    tokenizers = model.read_tokenizers(source.folder)
    placed = None if shardings is None else shardings(model.params)
    params = {}
    for name, (tensors, views) in opened.items():
        shapes = model.params[name]
        try:
            if on_device:
                where = None if placed is None else placed[name]
                params[name] = to_devices(views, shapes, tensors.release, where)
            else:
                params[name] = to_host(views, shapes, tensors.release)
        except ValueError as error:
            raise ValueError(f"{source.label(name)}: {error}") from None
    elsewhere = None if vae is None else str(vae)
    return dataclasses.replace(
        model, params=params, tokenizers=tokenizers, decoder_source=elsewhere
    )


def with_backbone(model: LatentModel, path: str | Path) -> LatentModel:
    """A model whose backbone's weights are another file's, which holds nothing else.

    Args:
      model: the model; the new weights lie where its own do.
      path: safetensors with the component's own names, such as diffusers' UNet.

    Raises:
      ValueError: the file is another network's, or a weight is not a finite number.
    """
    shapes = model.params[model.backbone]
    tensors = TensorFile([Path(path)])
    views = names.match_tensors(tensors, shapes, str(path))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    try:
        params = to_devices(views, shapes, tensors.release, shardings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model.with_params(**{model.backbone: params})


def abstract_model(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
    remat: str = "none",
) -> LatentModel:  # fmt: skip
    """The model that a folder's configs describe: shapes for weights, and no tokenizers.

    Args and errors are those of `load_model`.
    """
    source = Source.find(path, _open_file, weights=False)
    return _abstract(source, dtype=dtype, param_dtype=param_dtype, remat=remat)


def find_family(
    path: str | Path, config: str | Path | None = None
) -> tuple[type[LatentModel], Path]:
    """A model's family, and the folder of its configs, by its index alone.

    Args and errors are those of `load_model`.
    """
    source = Source.find(path, _open_file, config=config, weights=False)
    return _family_of(source), source.folder


def _abstract(source: Source, *, dtype: Any, param_dtype: Any, remat: str) -> LatentModel:
    family = _family_of(source)
    return family.from_configs(source, dtype=dtype, param_dtype=param_dtype, remat=remat)


def _family_of(source: Source) -> type[LatentModel]:
    kind = read_index(source.folder).kind
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{source.folder}: pipeline class {kind!r} is not one of {known}")
    return _family(FAMILIES[kind])


def _family(name: str) -> type[LatentModel]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _open_file(path: Path) -> SingleFile:
    """A single-file checkpoint, of whatever family recognises it."""
    for name in dict.fromkeys(FAMILIES.values()):
        file = _family(name).open_file(path)
        if file is not None:
            return file
    kind = describe_keys(TensorFile([path])) or "no single-file checkpoint of a known family"
    raise ValueError(f"{path} is {kind}")
