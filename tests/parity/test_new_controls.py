"""A ControlNet begins as diffusers' `from_unet` begins it, and is read back by diffusers."""

import jax
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from tests.support.families import SD_15, SD_21, shrink  # noqa: E402
from tests.support.published import UNET as SDXL  # noqa: E402
from tests.support.torch_networks import twins  # noqa: E402
from tlcm_jax.families.new_controls import new_control  # noqa: E402
from tlcm_jax.io.pipeline_folder import write_component  # noqa: E402
from tlcm_jax.models.unet import UNet2DConditionModel  # noqa: E402
from tlcm_jax.models.unet_config import UNetConfig  # noqa: E402

_RANDOM = ("controlnet_cond_embedding.conv_in.", "controlnet_cond_embedding.blocks.")


def new(kind, raw, unet, params, **more):
    key = jax.random.key(0)
    return new_control(kind, unet, raw, params, 8, key, **more)


@pytest.mark.parametrize("published", [SDXL, SD_15, SD_21], ids=["sdxl", "sd-1.5", "sd-2.1"])
def test_it_is_diffusers_from_unet(published, tmp_path):
    raw = shrink(published)
    unet = UNet2DConditionModel(UNetConfig.from_dict(raw))
    their_unet = diffusers.UNet2DConditionModel.from_config(raw)
    params = twins(unet, their_unet)
    theirs = diffusers.ControlNetModel.from_unet(
        their_unet, conditioning_embedding_out_channels=(4, 8, 12, 16)
    )
    control, config = new("controlnet", raw, unet, params, widths=(4, 8, 12, 16))
    write_component(tmp_path, config, control.params)
    ours = diffusers.ControlNetModel.from_pretrained(tmp_path)
    for name, value in theirs.config.items():
        if not name.startswith("_"):
            read = ours.config[name]
            assert value == (tuple(read) if isinstance(value, tuple) else read), name
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith(_RANDOM):
            assert ours[name].shape == value.shape and (torch.any(ours[name]) or "bias" in name)
        else:
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("published", [SDXL, SD_15], ids=["sdxl", "sd-1.5"])
def test_an_adapter_s_features_begin_at_zero_and_diffusers_reads_it(published, tmp_path):
    raw = shrink(published)
    unet = UNet2DConditionModel(UNetConfig.from_dict(raw))
    control, config = new("t2i-adapter", raw, unet, {}, channels=1)
    write_component(tmp_path, config, control.params)
    theirs = diffusers.T2IAdapter.from_pretrained(tmp_path)
    features = theirs(torch.rand(1, 1, 128, 128))
    levels = len(unet.config.block_out_channels)
    assert len(features) == (4 if "XL" in theirs.config.adapter_type.upper() else levels)
    assert not any(torch.any(feature) for feature in features)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(control.params))


def test_what_does_not_fit_is_one_line():
    raw = shrink(SD_15)
    unet = UNet2DConditionModel(UNetConfig.from_dict(raw))
    with pytest.raises(ValueError, match="8 pixels a side, for which 4 are needed"):
        new("controlnet", raw, unet, {}, widths=(4, 8))
    with pytest.raises(ValueError, match="of a ControlNet; a T2I-Adapter has none"):
        new("t2i-adapter", raw, unet, {}, widths=(4, 8))
    with pytest.raises(ValueError, match="kind 'union' is not one of controlnet, t2i-adapter"):
        new("union", raw, unet, {})
