"""Writes what a run trained in the formats that PyTorch programs read, and verifies them.

    python -m tlcm_jax.export --workdir runs/emoji --to lora,kohya,unet,pipeline,single-file \
        --output DIR --verify

Each product is a folder under DIR with its model card. `--verify` loads each in diffusers, draws
in 2, 4 and 8 steps and compares with this library; a product that differs is deleted, and the
command fails. It needs PyTorch and diffusers. With `--control PATH`, a ControlNet's folder or hub
id, each draws with that ControlNet too.
"""

import dataclasses
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from tlcm_jax.config.describe import student_recipe
from tlcm_jax.config.schema import read
from tlcm_jax.config.size_flags import define_size_flags, given_size
from tlcm_jax.config.workdir import load_adapter, trained_resolution
from tlcm_jax.families.load import find_family, load_model
from tlcm_jax.io.files import DTYPES
from tlcm_jax.io.lora_stack import merge_loras
from tlcm_jax.io.products import check_products, export_products
from tlcm_jax.io.verify import require_consumer, verify_products
from tlcm_jax.models.adapters import is_adapter, svd_extract


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    where = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "The run to export.", required=True, **where)
    flags.DEFINE_list("to", ["kohya"], "Products, of those of the model's family.", **where)
    flags.DEFINE_string("output", None, "Folder of the products.", required=True, **where)
    flags.DEFINE_enum("dtype", "fp16", list(DTYPES), "Dtype of the weights written.", **where)
    flags.DEFINE_bool("verify", False, "Compare each product with diffusers.", **where)
    define_size_flags(values, "with --verify: the run's, or the model's own")
    flags.DEFINE_string("control", None, "ControlNet that --verify draws with too.", **where)
    newest = "Checkpoint to export, in steps over all stages; the newest by default."
    flags.DEFINE_integer("step", None, newest, lower_bound=0, **where)
    extracted = "Rank of the LoRA extracted from a run that trained whole weights."
    flags.DEFINE_integer("rank", 64, extracted, lower_bound=1, **where)


def main(arguments: Sequence[str]) -> None:
    """Exports; anything wrong ends the process with one line that says what."""
    try:
        if arguments[1:]:
            raise ValueError(f"unexpected arguments {list(arguments[1:])}; use --to lora,pipeline")
        run(flags.FLAGS)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"export: {error}")


def run(values: flags.FlagValues) -> None:
    """Does what the flags say."""
    size = given_size(values) or trained_resolution(values.workdir)
    config, trained = load_adapter(values.workdir, values.step)
    path, vae = config["model"]["path"], config["model"].get("vae") or None
    family, folder = find_family(path)
    check_products(family.products, folder, values.to, values.dtype, values.output)
    if values.control and not values.verify:
        raise ValueError("--control goes with --verify, which draws with that ControlNet too")
    if values.verify:
        if family.verified_by is None:
            raise ValueError("--verify: no other library reads the products of this model")
        if vae is not None:
            raise ValueError("--verify: diffusers takes no teacher with another autoencoder")
        require_consumer()
    settings = read(config)
    model = merge_loras(load_model(path, on_device=False, vae=vae), settings.model.loras)
    recipe = student_recipe(settings, model)
    backbone = None
    if not is_adapter(trained) and any(not model.products[name].has_weights for name in values.to):
        backbone = trained
        teacher = model.params[model.backbone]
        trained, missed = svd_extract(teacher, backbone, values.rank)
        recipe = dataclasses.replace(recipe, rank=values.rank, missed=missed)
        print(f"LoRA of rank {values.rank}, extracted: misses {missed:.2%} of the change")
    products = export_products(
        model, trained, values.to, values.output, values.dtype, recipe, backbone=backbone
    )
    for target, path in products.items():
        print(f"{target}: {path}", flush=True)
    if not values.verify:
        return
    verified = verify_products(products, model.source, resolution=size, control=values.control)
    for target, differences in verified.items():
        shown = ", ".join(f"{steps} steps {value:.1e}" for steps, value in differences.items())
        print(f"{target} verified in {family.verified_by}; relative difference of latents: {shown}")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells each of its options
    define_flags(flags.FLAGS)
    app.run(main)
