"""Products in the hands of their consumer: loaded by diffusers, with its loaders kept quiet."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.pipeline_index import INDEX_FILE, read_index
from tlcm_jax.io.sources import CONFIG_FOLDER
from tlcm_jax.io.tensors import STEMS, weights_name


def product_kind(path: Path) -> str:
    """What a product is, from where it lies: lora (any dialect), backbone, pipeline, single-file.

    Args:
      path: as `products.export_products` returned it.
    """
    if path.is_dir():
        return "pipeline" if (path / INDEX_FILE).is_file() else "backbone"
    return "single-file" if (path.parent / CONFIG_FOLDER).is_dir() else "lora"


def load(path: Path, teacher: LatentModel) -> Any:
    """The diffusers pipeline with a product in it, loaded as the model card says, in fp32.

    Args:
      path: the product, where `export_products` said it lies.
      teacher: what LoRAs and UNets are put onto.
    """
    import diffusers
    import torch

    kind = product_kind(path)
    with _only_errors():
        if kind == "pipeline":
            pipe = _from_pretrained(path, teacher.backbone)
        elif kind == "single-file":
            pipe = _from_single_file(path, path.parent / CONFIG_FOLDER, teacher)
        else:
            single = Path(teacher.source).is_file()
            folder = Path(teacher.folder)
            pipe = (
                _from_single_file(Path(teacher.source), folder, teacher)
                if single
                else _from_pretrained(folder, teacher.backbone)
            )
            pipe.scheduler = diffusers.LCMScheduler.from_config(
                pipe.scheduler.config, original_inference_steps=8
            )
        pipe.set_progress_bar_config(disable=True)
        if kind == "backbone":
            network = getattr(diffusers, teacher.configs[teacher.backbone]["_class_name"])
            loaded = network.from_pretrained(str(path), dtype=torch.float32)
            pipe.register_modules(**{teacher.backbone: loaded})
        if kind == "lora":
            pipe.load_lora_weights(str(path))
            # Factors stored in fp16 stay so beside fp32 weights; this compares in fp32 throughout.
            getattr(pipe, teacher.backbone).to(torch.float32)
    return pipe


def with_controlnet(pipe: Any, folder: Path) -> Any:
    """The same networks in diffusers' ControlNet pipeline; a pipeline that is one already stays.

    Args:
      pipe: as `load` gives it.
      folder: of the ControlNet.
    """
    import diffusers
    import torch

    if hasattr(pipe, "controlnet"):
        return pipe
    name = type(pipe).__name__.replace("Pipeline", "ControlNetPipeline")
    with _only_errors():
        network = diffusers.ControlNetModel.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True
        )
        steered = getattr(diffusers, name).from_pipe(pipe, controlnet=network)
    steered.set_progress_bar_config(disable=True)
    return steered


def adapted_layers(network: Any) -> set[str]:
    """The layers of a diffusers network that PEFT put LoRA factors beside."""
    return {
        name.removesuffix(".lora_A")
        for name, _ in network.named_modules()
        if name.endswith(".lora_A")
    }


def _from_pretrained(folder: Path, backbone: str) -> Any:
    import diffusers
    import torch

    # What is fetched of a hub id leaves out what generation does without.
    absent = {k: None for k in read_index(folder).components if not (folder / k).is_dir()}
    # It takes what `load_model` takes, but has to be told where there is only fp16.
    name = weights_name([file.name for file in folder.glob(f"{backbone}/*")], STEMS[0])
    variant = "fp16" if name is not None and ".fp16" in name else None
    return diffusers.DiffusionPipeline.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, variant=variant, **absent
    )


def _from_single_file(file: Path, config: Path, teacher: LatentModel) -> Any:
    import diffusers
    import torch
    import transformers

    kind = getattr(diffusers, read_index(config).kind)
    encoders = list(teacher.text_params)
    widths = [teacher.configs[name]["hidden_size"] for name in encoders]
    towers = {}
    if len(widths) > len(set(widths)):
        # diffusers tells the two towers of a file apart by width; SDXL's differ, a miniature's
        # may not.
        logging.warning("%s: diffusers is given the teacher's second text encoder", file)
        towers[encoders[-1]] = transformers.CLIPTextModelWithProjection.from_pretrained(
            str(Path(teacher.folder) / encoders[-1]), dtype=torch.float32, local_files_only=True
        )
    return kind.from_single_file(
        str(file), config=str(config), dtype=torch.float32, local_files_only=True, **towers
    )


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Silences bars and hints of the consumer's loaders, which do not concern an export."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()
