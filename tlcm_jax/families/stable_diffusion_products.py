"""What students of Stable Diffusion are handed out as; which programs take each is in its card."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import flax.traverse_util

from tlcm_jax.diffusion.scheduler_config import lcm_scheduler
from tlcm_jax.families.product import Product, Student
from tlcm_jax.io.json_files import read_object
from tlcm_jax.io.ldm_names import UNET, unet_layers
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.io.lora_names import LoraNames
from tlcm_jax.io.model_card import FILES
from tlcm_jax.io.modelspec import modelspec
from tlcm_jax.io.pipeline_folder import check_components, write_component, write_pipeline
from tlcm_jax.io.single_file import layout_of, write_single_file
from tlcm_jax.io.sources import CONFIG_FOLDER

VAE, TOWERS = "vae", ("text_encoder", "text_encoder_2")


def _converted(layers: Iterable[str]) -> dict[str, str]:
    """The single-file names of a UNet's layers, but LCM's guidance embedding, which has none."""
    return unet_layers(set(layers) - {"time_embedding.cond_proj"})


# ComfyUI's and OneTrainer's names of a text encoder.
_TEXT_STEMS = ("text_encoders.{}.transformer.", "{}.transformer.", "text_encoders.{}.", "{}.")
LORA_NAMES = LoraNames(
    backbone=UNET,
    kohya={
        UNET: ("lora_unet_", "lycoris_"),
        TOWERS[0]: ("lora_te_", "lora_te1_"),  # alone, and as the first of two
        TOWERS[1]: ("lora_te2_",),
    },
    dotted={
        UNET: ("diffusion_model.", "model.diffusion_model."),
        TOWERS[0]: tuple(stem.format("clip_l") for stem in _TEXT_STEMS),
        TOWERS[1]: tuple(stem.format("clip_g") for stem in _TEXT_STEMS),
    },
    converted=_converted,
)


def _header(student: Student, rank: int = 0) -> dict[str, str]:
    model = student.model
    layout = "sdxl" if TOWERS[1] in model.params else "sd"
    if model.configs[TOWERS[0]].get("hidden_act", "quick_gelu") != "quick_gelu":
        layout = "sd2"
    return modelspec(
        student.metadata, layout, rank=rank,
        prediction_type=model.process.prediction_type, size=student.size or model.size,
    )  # fmt: skip


def _rank(adapter: Mapping) -> int:
    """The greatest rank of an adapter's layers."""
    flat = flax.traverse_util.flatten_dict(adapter)
    return max((leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "lora_A"), default=0)


def _write_lora(student: Student, folder: Path) -> None:
    write_lora(
        folder / FILES["lora"], student.adapter or {}, LORA_NAMES, dtype=student.dtype,
        metadata=_header(student, _rank(student.adapter or {})),
    )  # fmt: skip


def _write_kohya(student: Student, folder: Path) -> None:
    adapter = student.adapter or {}
    sdxl = TOWERS[1] in student.model.params
    write_lora(
        folder / FILES["kohya"], adapter, LORA_NAMES, dialect="kohya",
        renamed=_single_file_names(student.model.params[UNET], adapter) if sdxl else None,
        dtype=student.dtype, metadata=_header(student, _rank(adapter)),
    )  # fmt: skip


def _single_file_names(unet: Mapping, adapter: Mapping) -> dict[str, str]:
    """The single-file names of a UNet's adapted layers."""

    def layers(tree: Mapping) -> set[str]:
        return {".".join(path[:-1]) for path in flax.traverse_util.flatten_dict(tree)}

    # Blocks are counted through, so all of them are needed, adapted or not.
    blocks = {name for name in layers(unet) if "_blocks." in name}
    return unet_layers(blocks | layers(adapter))


def _write_unet(student: Student, folder: Path) -> None:
    config = student.model.configs[UNET]
    write_component(folder, config, student.params or {}, student.dtype)


def _write_pipeline(student: Student, folder: Path, weights: bool = True) -> None:
    model = student.model
    params = {**model.params, UNET: student.params}
    write_pipeline(
        folder,
        Path(model.folder),
        {name: (model.configs[name], params[name] if weights else None) for name in model.params},
        kind="StableDiffusionXLPipeline" if TOWERS[1] in params else "StableDiffusionPipeline",
        scheduler=lcm_scheduler(model.configs["scheduler"]),
        dtype=student.dtype,
    )


def _check_single_file(folder: Path) -> None:
    check_components(folder)
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("prediction_type") == "sample":
        raise ValueError(
            "a single file cannot say that a model predicts x0 (prediction_type 'sample'), and "
            'would be sampled as one that predicts eps: export "pipeline" instead'
        )
    towers = [name for name in TOWERS if (folder / name / "config.json").is_file()]
    layout_of({name: read_object(folder / name / "config.json") for name in towers})


def _write_single_file(student: Student, folder: Path) -> None:
    params = {**student.model.params, UNET: student.params}
    layout = layout_of(student.model.configs)
    write_single_file(
        folder / FILES["single-file"], params, layout, student.dtype, _header(student),
        student.model.configs["scheduler"],
    )  # fmt: skip
    # What the file itself cannot say, so that it loads without a network.
    _write_pipeline(student, folder / CONFIG_FOLDER, weights=False)


PRODUCTS = {
    "lora": Product(write=_write_lora, file=FILES["lora"], has_weights=False),
    "kohya": Product(write=_write_kohya, file=FILES["kohya"], has_weights=False),
    UNET: Product(write=_write_unet),
    "pipeline": Product(write=_write_pipeline, check=check_components),
    "single-file": Product(
        write=_write_single_file, file=FILES["single-file"], check=_check_single_file
    ),
}
