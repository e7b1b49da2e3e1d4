"""The discriminator's reading of a UNet: the states it sees, and what its parts are trained on."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_pipeline import UNET, write_tiny_pipeline
from tlcm_jax.distillation.networks import BASE, model_networks
from tlcm_jax.distillation.terms.adversarial import AdversarialSettings
from tlcm_jax.families.load import abstract_model
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.models.discriminator import Head, choose_layers
from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.models.unet import UNet2DConditionModel, feature_widths
from tlcm_jax.models.unet_config import UNetConfig

CONFIG = UNetConfig.from_dict(UNET)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Configs and shapes; nothing here computes with the network."""
    return abstract_model(write_tiny_pipeline(tmp_path_factory.mktemp("tiny")))


def conditioning(batch):
    return Conditioning(
        prompt_embeds=jax.ShapeDtypeStruct((batch, 7, 32), jnp.float32),
        pooled=jax.ShapeDtypeStruct((batch, 16), jnp.float32),
        time_ids=jax.ShapeDtypeStruct((batch, 6), jnp.float32),
    )


def test_features_are_the_states_of_the_way_down_and_the_middle(pipeline):
    z, t = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def features(params, z, t, c):
        return pipeline.predict(params, z, t, c, features=True)

    base = pipeline.params[pipeline.backbone]
    found = jax.eval_shape(features, base, z, t, conditioning(2))
    assert {k: v.shape for k, v in found.items()} == {
        "down_blocks.0": (2, 8, 8, 32), "down_blocks.1": (2, 4, 4, 64), "mid_block": (2, 4, 4, 64),
    }  # fmt: skip
    assert {k: v.shape[-1] for k, v in found.items()} == feature_widths(CONFIG)


def test_nothing_is_computed_beyond_the_middle(pipeline):
    """The up blocks' weights are not even read: a discriminator costs half a forward."""
    z, t = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    base = pipeline.params[pipeline.backbone]
    below = {k: v for k, v in base.items() if not k.startswith("up_blocks")}

    def features(params, z, t, c):
        return pipeline.predict(params, z, t, c, features=True)

    assert jax.eval_shape(features, below, z, t, conditioning(1))


@pytest.mark.parametrize("merged", [True, False])
def test_its_parameters_are_an_adapter_up_to_the_middle_and_heads(pipeline, merged):
    adapter = LoRAConfig(rank=2, merged=merged)
    settings = AdversarialSettings(layers=("down_blocks.1", "mid_block"))
    term = settings.load(pipeline, model_networks(pipeline, adapter), adapter)
    psi = jax.eval_shape(term.init, jax.random.key(0))
    assert set(psi["heads"]) == {"down_blocks.1", "mid_block"}
    names = {path[0] for path in flax.traverse_util.flatten_dict(psi["adapter"])}
    assert names == {"down_blocks.0", "down_blocks.1", "mid_block"}
    z, t = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def logits(psi, frozen, z, t, c):
        return term.discriminator(psi, frozen)(z, t, c)

    frozen = {BASE: pipeline.params[pipeline.backbone]}
    maps = jax.eval_shape(logits, psi, frozen, z, t, conditioning(2))
    assert [m.shape for m in maps] == [(2, 4, 4, 1)] * 2


def test_a_head_judges_every_place_by_itself():
    """But for the norms' statistics, which all places share."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    head = Head(groups=2)
    params, apply = jax.jit(head.init)(jax.random.key(1), x), jax.jit(head.apply)
    found = apply(params, x)
    assert found.shape == (2, 4, 4, 1) and found.dtype == jnp.float32
    flipped = apply(params, x[:, ::-1])
    np.testing.assert_allclose(flipped, found[:, ::-1], atol=1e-5)


def test_blocks_that_do_not_exist_are_refused():
    known = feature_widths(CONFIG)
    assert choose_layers((), known) == ("down_blocks.0", "down_blocks.1", "mid_block")
    with pytest.raises(ValueError, match=r"\['up_blocks.0'\]; this UNet has down_blocks.0, "):
        choose_layers(("mid_block", "up_blocks.0"), known)
    with pytest.raises(ValueError, match="named twice"):
        choose_layers(("mid_block", "mid_block"), known)
    flat = dataclasses.replace(CONFIG, mid_block_type=None)
    assert "mid_block" not in feature_widths(flat)
    assert UNet2DConditionModel(flat).config.mid_block_type is None
