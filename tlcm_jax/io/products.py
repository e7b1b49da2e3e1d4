"""What a student is handed out as: LoRA files, a UNet, a pipeline, a single file; with cards."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.families.load import load_model
from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.io.files import DTYPES, atomic_write
from tlcm_jax.io.lora_files import write_lora
from tlcm_jax.io.model_card import FILES, PROJECT, Recipe, model_card
from tlcm_jax.io.pipeline_folder import write_component, write_configs, write_pipeline
from tlcm_jax.io.single_file import family_of, write_single_file
from tlcm_jax.io.sources import CONFIG_FOLDER
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import is_adapter

LORAS = {"lora": "diffusers", "kohya": "kohya"}
TARGETS = (*LORAS, "unet", "pipeline", "single-file")


def check_targets(targets: Sequence[str], dtype: str = "fp32") -> None:
    """Refuses products and dtypes that there are none of, before any work is done.

    Raises:
      ValueError: an unknown product or dtype, or no product at all.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        named = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"cannot export {named}; choose from {', '.join(TARGETS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def export_products(
    pipeline: StableDiffusion,
    adapter: Mapping[str, Any] | None,
    targets: Sequence[str],
    output: str | Path,
    dtype: str,
    recipe: Recipe,
    *,
    unet: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Writes products, each into `output/<target>`, whole or not at all.

    A product of an earlier export is replaced, and only once the new one is whole.

    Args:
      pipeline: the teacher. Products that hold its weights read them again from its source, in
        fp32 whatever the run kept them in.
      adapter: the trained LoRA, scaled, or one extracted from full weights; or the weights of a
        UNet trained whole, as `unet`. None if no product needs it.
      targets: some of `TARGETS`.
      output: the folder that holds the products.
      dtype: of all weights, one of `files.DTYPES`.
      recipe: for the cards.
      unet: a full fine-tune's weights; by default the teacher's with the adapter added.

    Returns:
      Where each product is: the LoRAs' and the single file's safetensors, the UNet's and the
      pipeline's folder.

    Raises:
      ValueError: an unknown target or dtype, weights that do not fit in the dtype, or a model that
        the single-file layout has no place for.
      FileExistsError: `output/<target>` holds something else than an earlier export.
      OSError: a product cannot be written; it is named, and those before it are whole.
    """
    check_targets(targets, dtype)
    if adapter is not None and not is_adapter(adapter):
        adapter, unet = None, adapter
    targets = list(dict.fromkeys(targets))
    if adapter is None and (unet is None or LORAS.keys() & set(targets)):
        raise ValueError("a LoRA can only be exported of an adapter: extract one from the weights")
    if "single-file" in targets:
        family_of(pipeline.configs)  # refuses what the layout cannot hold, before all else
    if set(targets) - LORAS.keys():
        pipeline = fp32(pipeline)
        if unet is None:
            unet = lora.merge(pipeline.params["unet"], adapter or {})

    def write(target: str, part: Path) -> None:
        if target in LORAS:
            dialect, file = LORAS[target], part / FILES[target]
            write_lora(file, adapter or {}, dialect=dialect, dtype=dtype, metadata=metadata)
        elif target == "unet":
            write_component(part, pipeline.configs["unet"], unet or {}, dtype)
        else:
            params, family = {**pipeline.params, "unet": unet}, family_of(pipeline.configs)
            write_single_file(part / FILES[target], params, family, dtype, metadata)
            # What the file itself cannot say, so that it loads without a network.
            write_configs(pipeline, part / CONFIG_FOLDER)

    metadata = recipe.metadata()
    products: dict[str, Path] = {}
    for target in targets:
        folder = Path(output) / target
        replace, card = _is_export(folder), {"README.md": model_card(recipe, target)}
        if target == "pipeline":
            write_pipeline(pipeline, folder, unet=unet, dtype=dtype, replace=replace, extra=card)
        else:
            _write_folder(folder, replace, card["README.md"], functools.partial(write, target))
        products[target] = folder / FILES[target] if target in FILES else folder
    return products


def fp32(pipeline: StableDiffusion) -> StableDiffusion:
    """A pipeline with its weights read again from where they came, in fp32, into host memory."""
    single = Path(pipeline.source).is_file()
    config = pipeline.folder if single else None
    return load_model(pipeline.source, on_device=False, config=config)


def product_kind(path: Path) -> str:
    """What a product is, from where `export_products` said it lies; `lora` for both dialects."""
    if path.is_dir():
        return "pipeline" if (path / "model_index.json").is_file() else "unet"
    return "single-file" if path.name == FILES["single-file"] else "lora"


def product_folder(path: Path) -> Path:
    """The folder of a product, whatever part of it `export_products` returned."""
    return path if path.is_dir() else path.parent


def _write_folder(folder: Path, replace: bool, card: str, write: Callable[[Path], None]) -> None:
    with atomic_write(folder, replace=replace) as part:
        part.mkdir()
        write(part)
        (part / "README.md").write_text(card, encoding="utf-8")


def _is_export(folder: Path) -> bool:
    """Whether a folder was written by `export_products`, and may be written again."""
    card = folder / "README.md"
    return card.is_file() and PROJECT in card.read_text(encoding="utf-8", errors="replace")
