import jax
import jax.numpy as jnp
import pytest

from tests.support.families import SD_15, SDXL, SSD_1B, UNETS, shrink
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig


def test_depths_of_uneven_networks():
    config = UNetConfig.from_dict(SSD_1B)
    assert config.transformer_layers == ((1, 1), (2, 2), (4, 4))
    assert config.up_transformer_layers == ((4, 4, 10), (2, 1, 1), (1, 1, 1))
    assert config.mid_block_type == "UNetMidBlock2D"
    assert UNetConfig.from_dict(SDXL).up_transformer_layers == ((10,) * 3, (2,) * 3, (1,) * 3)


def test_attention_head_dim_is_a_number_of_heads():
    assert UNetConfig.from_dict(SD_15).num_attention_heads == (8, 8, 8, 8)
    assert UNetConfig.from_dict(SDXL).num_attention_heads == (5, 10, 20)


def test_the_published_configs_are_read():
    """Keys that only newer files have, at the values that change nothing."""
    silent = dict(attention_type="default", dropout=0.0, num_attention_heads=None, sample_size=None)
    for config in UNETS.values():
        assert UNetConfig.from_dict(config | silent).in_channels == config["in_channels"]
    assert UNetConfig.from_dict(SDXL | {"sample_size": [64, 96]}).sample_size == (64, 96)
    assert (
        UNetConfig.from_dict(SDXL | {"cross_attention_dim": [2048] * 3}).cross_attention_dim == 2048
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "projection"}, "class_embed_type='projection'.*only None"),  # unCLIP
        ({"num_class_embeds": 1000}, "num_class_embeds=1000"),  # x4 upscaler
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),  # Kandinsky
        ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"only_cross_attention": [True, False, False]}, "only_cross_attention=.True"),
        ({"attention_type": "gated"}, "attention_type='gated'"),  # GLIGEN
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"conv_in_kernel": 1}, "conv_in_kernel=1"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type='UNetMidBlock2DSimp"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types 'AttnDownBlock2D'"),
        ({"up_block_types": ["DownBlock2D"] * 3}, "up_block_types 'DownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types=.* needs 3 values"),
        ({"attention_head_dim": [5, 10]}, r"attention_head_dim=\[5, 10\] needs 3 values"),
        ({"attention_head_dim": 7}, "320 channels do not divide into 7 heads"),
        ({"norm_num_groups": None}, "None groups"),
        ({"cross_attention_dim": [768, 1024, 768]}, "cross_attention_dim=.* differs by level"),
        (
            {"transformer_layers_per_block": [1, [2, 2], 10]},
            "transformer_layers_per_block=.*needs reverse_transformer_layers_per_block",
        ),
        (
            {"reverse_transformer_layers_per_block": [[4, 4], 2, 1]},
            r"reverse_transformer_layers_per_block=\[4, 4\] needs 3 values",
        ),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=f"unet config: .*{message}"):
        UNetConfig.from_dict(SDXL | change)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sdxl", {"text_embeds": None}, "needs text_embeds and time_ids"),
        ("sdxl", {"text_embeds": (1, 21)}, "takes text_embeds of width 20, got 21"),
        ("sdxl", {"time_ids": (1, 5)}, "takes text_embeds of width 28, got 20"),
        ("sdxl", {"encoder_hidden_states": (1, 7, 8)}, "encoder_hidden_states of width 24, got 8"),
        ("sdxl", {"timestep_cond": (1, 12)}, "takes timestep_cond of width None, got 12"),
        ("sdxl-lcm", {}, "takes timestep_cond of width 12, got None"),
        ("sdxl-inpainting", {}, "takes sample of width 9, got 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(family, change, message):
    net = UNet2DConditionModel(UNetConfig.from_dict(shrink(UNETS[family])))
    shapes = {
        "sample": (1, 8, 8, 4), "timesteps": (1,), "encoder_hidden_states": (1, 7, 24),
        "text_embeds": (1, 20), "time_ids": (1, 6),
    } | change  # fmt: skip
    inputs = {name: None if shape is None else jnp.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: net.apply({"params": {}}, **inputs))
