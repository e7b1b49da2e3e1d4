"""What a student is handed out as: LoRA files and a pipeline folder, each with its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.interchange.diffusers_folder import load_pipeline
from tlcm_jax.interchange.files import DTYPES, whole
from tlcm_jax.interchange.lora_files import write_lora
from tlcm_jax.interchange.model_card import LORA_FILES, PROJECT, Recipe, model_card
from tlcm_jax.interchange.pipeline import Pipeline
from tlcm_jax.interchange.pipeline_folder import write_pipeline
from tlcm_jax.models import lora

_DIALECTS = {"lora": "diffusers", "kohya": "kohya"}
TARGETS = (*_DIALECTS, "pipeline")


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
    pipeline: Pipeline,
    adapter: Mapping[str, Any],
    targets: Sequence[str],
    output: str | Path,
    dtype: str,
    recipe: Recipe,
) -> dict[str, Path]:
    """Writes products, each into `output/<target>`, whole or not at all.

    A product of an earlier export is replaced, and only once the new one is whole.

    Args:
      pipeline: the teacher. The pipeline product reads its weights again from `pipeline.source`,
        in fp32 whatever the run kept them in.
      adapter: the trained LoRA, scaled; or the trained weights, of a UNet trained whole.
      targets: some of `TARGETS`.
      output: the folder that holds the products.
      dtype: of all weights, one of `files.DTYPES`.
      recipe: for the cards.

    Returns:
      Where each product is: the LoRAs' safetensors files, the pipeline's folder.

    Raises:
      ValueError: an unknown target or dtype, a LoRA of weights that were trained whole, or
        weights that do not fit in the dtype.
      FileExistsError: `output/<target>` holds something else than an earlier export.
      OSError: a product cannot be written; it is named, and those before it are whole.
    """
    check_targets(targets, dtype)
    if not lora.is_low_rank(adapter) and set(targets) & set(_DIALECTS):
        raise ValueError(
            f"the student's weights were trained whole, so there is no LoRA to write as "
            f"{', '.join(sorted(set(targets) & set(_DIALECTS)))}; export 'pipeline'"
        )
    output = Path(output)
    products: dict[str, Path] = {}
    for target in dict.fromkeys(targets):
        folder = output / target
        replace = _is_export(folder)
        card = model_card(recipe, target)
        if target == "pipeline":
            teacher = load_pipeline(pipeline.source, on_device=False)
            products[target] = write_pipeline(
                teacher,
                folder,
                unet=lora.merge(teacher.params["unet"], adapter),
                dtype=dtype,
                replace=replace,
                extra={"README.md": card},
            )
            continue
        with whole(folder, replace=replace) as part:
            part.mkdir()
            write_lora(
                part / LORA_FILES[target],
                adapter,
                dialect=_DIALECTS[target],
                dtype=dtype,
                metadata=recipe.metadata(),
            )
            (part / "README.md").write_text(card, encoding="utf-8")
        products[target] = folder / LORA_FILES[target]
    return products


def product_folder(path: Path) -> Path:
    """The folder of a product, whatever part of it `export_products` returned."""
    return path if path.is_dir() else path.parent


def _is_export(folder: Path) -> bool:
    """Whether a folder was written by `export_products`, and may be written again."""
    card = folder / "README.md"
    return card.is_file() and PROJECT in card.read_text(encoding="utf-8", errors="replace")
