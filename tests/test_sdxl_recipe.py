"""The full-size recipe builds, shape-checks and lowers, on a mesh of eight, without weights."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from tests.support.published import write_sdxl_configs
from tlcm_jax import paths
from tlcm_jax.config.build import abstract_adapter, blueprints
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.state import create


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("sdxl", paths.ROOT / "configs" / "sdxl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pytest.mark.parametrize(
    ("variant", "stage"),
    [
        ("", "segments2"),
        # As the one above, but for where a jump lands.
        pytest.param("paper", "segments", marks=pytest.mark.slow),
        pytest.param("paper", "endpoints", marks=pytest.mark.slow),
    ],
)
def test_lowers(tmp_path, recipe, variant, stage):
    settings = read(recipe(variant).to_dict())
    pipeline = abstract_model(
        write_sdxl_configs(tmp_path), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="blocks"
    )
    mesh = make_mesh(settings.mesh)
    plan = next(p for p in blueprints(settings, pipeline, mesh) if p.name == stage)
    prepared = plan.stage(lambda k: None)
    adapter = abstract_adapter(settings, pipeline.params["unet"])
    state = jax.eval_shape(lambda a: create(a, prepared.optimizer, jax.random.key(0)), adapter)
    ids = tuple(jax.ShapeDtypeStruct((16, 77), jnp.int32) for _ in pipeline.text_encoders)
    encode = lambda params, ids: pipeline.encode_tokens(params, ids, 1024)  # noqa: E731
    conditioning = jax.eval_shape(encode, pipeline.params, ids)
    assert conditioning.prompt_embeds.shape == (16, 77, 2048)
    assert conditioning.pooled.shape == (16, 1280)
    null = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), conditioning)
    frozen = {"unet": pipeline.params["unet"], "null": null}
    lowered = prepared.step.lower(state, frozen, {"conditioning": conditioning})
    assert plan.examples == (16 if stage == "endpoints" else 272)
    out_state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, out_state.trainable) == jax.tree.map(
        lambda x: x.shape, adapter
    )
    assert metrics["loss"].shape == ()
