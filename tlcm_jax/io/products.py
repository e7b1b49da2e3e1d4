"""What a student is handed out as, by the table of its family; each with its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.load import load_model
from tlcm_jax.families.product import Product, Student
from tlcm_jax.io.files import DTYPES, atomic_write
from tlcm_jax.io.model_card import PROJECT, Recipe
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import is_adapter


def check_products(
    products: Mapping[str, Product],
    folder: Path,
    chosen: Sequence[str],
    dtype: str = "fp32",
    output: str | Path | None = None,
) -> None:
    """Refuses products and dtypes that there are none of, before any work is done.

    Args:
      products: of the model's family.
      folder: the model's, with its configs.
      chosen: some of `products`.
      dtype: one of `files.DTYPES`.
      output: the folder that will hold the products.

    Raises:
      ValueError: an unknown product or dtype, no product at all, or one that there can be none of
        for this model.
      FileNotFoundError: the model's folder lacks what a product needs.
      FileExistsError: something else than an earlier export lies where a product will.
    """
    unknown = [name for name in chosen if name not in products]
    if unknown or not chosen:
        named = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"cannot export {named}; choose from {', '.join(products)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    for name in chosen:
        products[name].check(folder)
        if output is not None:
            _check_room(Path(output) / name)


def _check_room(place: Path) -> None:
    empty = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    if not empty and not _is_export(place):
        raise FileExistsError(f"{place} already holds files; give another folder, or empty it")


def export_products(
    model: LatentModel,
    trained: Mapping[str, Any],
    chosen: Sequence[str],
    output: str | Path,
    dtype: str,
    recipe: Recipe,
    *,
    backbone: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Writes products, each into `output/<name>`, whole or not at all.

    A product of an earlier export is replaced, and only once the new one is whole.

    Args:
      model: the teacher. Products that hold its weights read them again from its source, in fp32
        whatever the run kept them in.
      trained: the LoRA, scaled, trained as such or extracted from full weights; or a full
        fine-tune's weights of the backbone, of which there is no LoRA product.
      chosen: some of `model.products`.
      output: the folder that holds the products.
      dtype: of all weights, one of `files.DTYPES`.
      recipe: for the cards.
      backbone: a full fine-tune's weights, beside the LoRA extracted from them; by default the
        teacher's with the adapter added.

    Returns:
      Where each product is: its file, or the folder that it is.

    Raises:
      ValueError: an unknown product or dtype, weights that do not fit in the dtype, or a model
        that there is no such product of.
      FileExistsError: `output/<name>` holds something else than an earlier export.
      OSError: a product cannot be written; it is named, and those before it are whole.
    """
    check_products(model.products, Path(model.folder), chosen, dtype, output)
    wanted = {name: model.products[name] for name in chosen}
    adapter = trained if is_adapter(trained) else None
    for product in wanted.values():
        if not product.has_weights and adapter is None:
            raise ValueError(
                "a LoRA can only be exported of an adapter: extract one from the weights"
            )
    params = None
    if any(product.has_weights for product in wanted.values()):
        model = fp32(model)
        params = backbone
        if params is None:
            params = lora.merge(model.params[model.backbone], trained)
    student = Student(
        model=model, adapter=adapter, params=params, dtype=dtype, metadata=recipe.metadata(),
        size=recipe.size,
    )  # fmt: skip
    written = {}
    for name, product in wanted.items():
        folder = Path(output) / name
        with atomic_write(folder, replace=_is_export(folder)) as part:
            part.mkdir()
            product.write(student, part)
            texts = {"README.md": model.card(recipe, name), **model.companions(recipe, name)}
            for file, text in texts.items():
                (part / file).write_text(text, encoding="utf-8")
        written[name] = folder if product.file is None else folder / product.file
    return written


def fp32(model: LatentModel) -> LatentModel:
    """A model with its weights read again from where they came, in fp32, into host memory."""
    single = Path(model.source).is_file()
    config = model.folder if single else None
    again = load_model(model.source, on_device=False, config=config, vae=model.decoder_source)
    return model.with_params(**again.params)


def product_folder(path: Path) -> Path:
    """The folder of a product, whatever part of it `export_products` returned."""
    return path if path.is_dir() else path.parent


def _is_export(folder: Path) -> bool:
    """Whether a folder was written by `export_products`, and may be written again."""
    card = folder / "README.md"
    return card.is_file() and PROJECT in card.read_text(encoding="utf-8", errors="replace")
