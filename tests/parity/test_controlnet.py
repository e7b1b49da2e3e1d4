"""ControlNets and T2I-Adapters, and UNets steered by them, against diffusers on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from tests.support.blockwise import blockwise  # noqa: E402
from tests.support.controls import (  # noqa: E402
    ADAPTERS,
    CONTROLNETS,
    shrunk_adapter,
    shrunk_controlnet,
)
from tests.support.families import shrink  # noqa: E402
from tests.support.torch_networks import array, relative, tensor, twins  # noqa: E402
from tlcm_jax.models.controlnet import ControlNetConfig, ControlNetModel  # noqa: E402
from tlcm_jax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig  # noqa: E402
from tlcm_jax.models.unet import UNet2DConditionModel  # noqa: E402
from tlcm_jax.models.unet_config import UNetConfig  # noqa: E402

BATCH, TOKENS = 2, 7
TIMES = np.array([999, 120])


def some_slow(forms, quick):
    """The quick ones by default, the others on demand."""
    return [form if form in quick else pytest.param(form, marks=pytest.mark.slow) for form in forms]


def unet_twins(config):
    small = shrink(config)
    ours = UNet2DConditionModel(UNetConfig.from_dict(small))
    theirs = diffusers.UNet2DConditionModel.from_config(small)
    return ours, theirs, twins(ours, theirs, seed=1)


def draw(config, height, width):
    """The UNet's inputs, by our names."""
    rng = np.random.default_rng(1)
    inputs = {
        "sample": rng.standard_normal((BATCH, height, width, 4), np.float32),
        "timesteps": TIMES,
        "encoder_hidden_states": rng.standard_normal(
            (BATCH, TOKENS, config.cross_attention_dim), np.float32
        ),
    }
    if config.text_time:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = rng.standard_normal((BATCH, pooled), np.float32)
        inputs["time_ids"] = rng.integers(0, 1024, (BATCH, 6)).astype(np.float32)
    return inputs


def theirs_of(inputs):
    """The same for diffusers, as arguments of a UNet and a ControlNet."""
    added = None
    if "time_ids" in inputs:
        added = {name: tensor(inputs[name]) for name in ("text_embeds", "time_ids")}
    return dict(
        sample=tensor(inputs["sample"], images=True),
        timestep=torch.from_numpy(inputs["timesteps"]),
        encoder_hidden_states=tensor(inputs["encoder_hidden_states"]),
        added_cond_kwargs=added,
    )


def picture(height, width, channels):
    return np.random.default_rng(2).random((BATCH, height, width, channels), np.float32)


@pytest.mark.parametrize("form", some_slow(CONTROLNETS, ("sdxl", "sd-1.5")))
def test_controlnet_and_the_unet_it_steers(form):
    config, of_unet = CONTROLNETS[form]
    small = shrunk_controlnet(config)
    ours = ControlNetModel(ControlNetConfig.from_dict(small))
    theirs = diffusers.ControlNetModel.from_config(small)
    params = twins(ours, theirs)
    unet, their_unet, unet_params = unet_twins(of_unet)
    inputs, image = draw(unet.config, 13, 19), picture(8 * 13, 8 * 19, 3)
    scale = np.array([0.7, 0.7], np.float32)
    with torch.no_grad():
        given = theirs_of(inputs)
        down, mid = theirs(
            controlnet_cond=tensor(image, images=True), conditioning_scale=0.7, return_dict=False,
            **given,
        )  # fmt: skip
        steered = their_unet(
            down_block_additional_residuals=down, mid_block_additional_residual=mid, **given
        ).sample
        plain = their_unet(**given).sample
    arrays = jax.tree.map(jnp.asarray, inputs)
    with blockwise():
        residuals = ours.apply({"params": params}, image=image, scale=scale, **arrays)
        output = unet.apply({"params": unet_params}, residuals=residuals, **arrays)
    assert len(residuals.down) == len(down)
    for mine, other in zip((*residuals.down, residuals.mid), (*down, mid), strict=True):
        assert relative(mine, array(other, images=True)) < 1e-5
    assert relative(output, array(steered, images=True)) < 1e-5
    # The residuals are seen in what is drawn.
    assert relative(array(plain), array(steered)) > 1e-2


@pytest.mark.parametrize("form", some_slow(ADAPTERS, ("sdxl", "sd-1.5-light")))
def test_adapter_and_the_unet_it_steers(form):
    config, of_unet = ADAPTERS[form]
    small = shrunk_adapter(config)
    ours = T2IAdapter(T2IAdapterConfig.from_dict(small))
    theirs = diffusers.T2IAdapter.from_config(small)
    params = twins(ours, theirs)
    unet, their_unet, unet_params = unet_twins(of_unet)
    # As long as the factor allows: latents of 10 and 14 halve to 5 and 7, then to 3 and 4.
    inputs, image = draw(unet.config, 10, 14), picture(80, 112, config["in_channels"])
    with torch.no_grad():
        features = [0.8 * state for state in theirs(tensor(image, images=True))]
        given = theirs_of(inputs)
        plain = their_unet(**given).sample
        steered = their_unet(
            down_intrablock_additional_residuals=[state.clone() for state in features], **given
        ).sample
    residuals = ours.apply({"params": params}, image, np.array([0.8, 0.8], np.float32))
    assert len(residuals.adapter_features) == len(features)
    for mine, other in zip(residuals.adapter_features, features, strict=True):
        assert relative(mine, array(other, images=True)) < 1e-5
    arrays = jax.tree.map(jnp.asarray, inputs)
    with blockwise():
        output = unet.apply({"params": unet_params}, residuals=residuals, **arrays)
    assert relative(output, array(steered, images=True)) < 1e-5
    assert relative(array(plain), array(steered)) > 1e-2
