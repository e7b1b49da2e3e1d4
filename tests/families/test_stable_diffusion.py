"""Stable Diffusion behind the family's seam: identity, nulls, names."""

import ast
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import paths
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.generation.generate import generate
from tlcm_jax.io.json_files import read_object, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def variant(folder, target, file, **entries):
    """The same weights under another config."""
    target.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    write_json(target / file, {**read_object(target / file), **entries})
    return target


def test_models_share_compiled_code_if_their_functions_are_the_same(folder, tmp_path):
    model, again = abstract_model(folder), abstract_model(folder)
    assert model.static_key == again.static_key and hash(model.static_key) == hash(again.static_key)
    scheduler = "scheduler/scheduler_config.json"
    others = [
        abstract_model(variant(folder, tmp_path / "v", scheduler, prediction_type="v_prediction")),
        abstract_model(variant(folder, tmp_path / "beta", scheduler, beta_end=0.013)),
        abstract_model(
            variant(
                folder, tmp_path / "null", "model_index.json", force_zeros_for_empty_prompt=False
            )
        ),
        abstract_model(variant(folder, tmp_path / "vae", "vae/config.json", scaling_factor=0.25)),
        abstract_model(variant(folder, tmp_path / "eps", "unet/config.json", sample_size=16)),
        abstract_model(folder, dtype=jnp.bfloat16),
        dataclasses.replace(model, embedded_guidance=3.0),
    ]
    keys = {other.static_key for other in (model, *others)}
    assert len(keys) == 1 + len(others)
    assert not jax.tree.leaves(model.without_weights().params)


def test_another_prediction_of_the_same_weights_is_another_image(folder, tmp_path):
    """Which would not be seen if compiled code were shared between them."""
    config = "scheduler/scheduler_config.json"
    other = variant(folder, tmp_path / "v", config, prediction_type="v_prediction")
    first, second = (generate(load_model(path), ["a cat"], 1, 0) for path in (folder, other))
    assert np.mean(first != second) > 0.5


def test_the_null_keeps_what_is_no_text(folder):
    model = load_model(folder)
    null, conditioning = model.null_conditioning(), model.encode(["a red cat"], 48)
    found = model.null_of(null, conditioning)
    np.testing.assert_array_equal(found.time_ids, conditioning.time_ids)
    assert np.any(found.time_ids != null.time_ids)
    assert not np.any(found.prompt_embeds) and not np.any(found.pooled)
    assert np.any(conditioning.prompt_embeds) and np.any(conditioning.pooled)


def test_components_are_named_once():
    """Whatever the backbone is called, only its family's file rules say so."""
    found = [
        file.relative_to(paths.ROOT)
        for file in (paths.ROOT / "tlcm_jax").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "unet"
    ]
    assert [str(path) for path in found] == ["tlcm_jax/io/ldm_names.py"]


def test_height_and_width_are_told_apart(folder, tmp_path):
    model = load_model(folder)
    assert model.latent_shape("48x32") == (8, 12, 4) and model.latent_shape(48) == (12, 12, 4)
    told = model.encode(["a cat"], "48x32").time_ids
    np.testing.assert_array_equal(told, [[32, 48, 0, 0, 32, 48]])
    tall = abstract_model(
        variant(folder, tmp_path / "tall", "unet/config.json", sample_size=[12, 8])
    )
    assert tall.latent_shape() == (12, 8, 4) and str(tall.size) == "32x48"
    with pytest.raises(ValueError, match="resolution 50x30 .* multiple of 4: the nearest is 52x32"):
        model.latent_shape("50x30")


@pytest.mark.parametrize("size", [[8], [8, 8, 8], [8, "8"], "8", [8, 10**6]])
def test_a_sample_size_is_a_side_or_a_height_and_a_width(folder, tmp_path, size):
    wrong = variant(folder, tmp_path / "wrong", "unet/config.json", sample_size=size)
    with pytest.raises(ValueError, match="unet/config.json: sample_size = .*must be"):
        abstract_model(wrong)
