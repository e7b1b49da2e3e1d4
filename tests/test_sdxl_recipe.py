"""The full-size recipe builds, shape-checks and lowers, on a mesh of eight, without weights."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from tests.support.published import write_sdxl_configs
from tlcm_jax import paths
from tlcm_jax.config.build import initial_trainable, load_losses, stage_spec
from tlcm_jax.config.run import frozen_params
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.stage import Stage


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("sdxl", paths.ROOT / "configs" / "sdxl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pytest.mark.parametrize(
    ("variant", "stage"),
    [
        pytest.param("segments", "segments2", marks=pytest.mark.slow),
        # As the one above, but for where a jump lands.
        pytest.param("paper", "segments", marks=pytest.mark.slow),
        pytest.param("paper", "endpoints", marks=pytest.mark.slow),
    ],
)
def test_lowers(tmp_path, recipe, variant, stage):
    settings = read(recipe(variant).to_dict())
    model = abstract_model(
        write_sdxl_configs(tmp_path), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="blocks"
    )
    loss = load_losses(settings, model)[stage]
    mesh = make_mesh(settings.mesh)
    spec = stage_spec(stage, settings.stages[stage], loss, mesh, lambda r: None, {})
    prepared = Stage(spec, mesh)
    adapter = jax.eval_shape(lambda: initial_trainable(settings, model, jax.random.key(0)))
    state = jax.eval_shape(lambda a: spec.create_state(a, jax.random.key(0)), adapter)
    ids = tuple(jax.ShapeDtypeStruct((16, 77), jnp.int32) for _ in model.text_encoders)
    encode = lambda params, ids: model.encode_tokens(params, ids, 1024)  # noqa: E731
    conditioning = jax.eval_shape(encode, model.text_params, ids)
    assert conditioning.prompt_embeds.shape == (16, 77, 2048)
    assert conditioning.pooled.shape == (16, 1280)
    null = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), conditioning)
    frozen = frozen_params(model, null)
    refill = prepared.stream.refill.lower(
        adapter, frozen, {"conditioning": conditioning}, state.key, jnp.zeros((), jnp.uint32)
    )
    steps = 1 if stage == "endpoints" else 17
    assert spec.pairs.steps_per_refill == steps
    made = refill.out_info
    assert made.z_m.shape == (steps, 16, 128, 128, 4)
    pairs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made)
    out_state, metrics = prepared.update.lower(state, frozen, pairs).out_info
    assert jax.tree.map(lambda x: x.shape, out_state) == jax.tree.map(lambda x: x.shape, state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out_state.student.params))
    assert metrics["loss"].shape == ()
