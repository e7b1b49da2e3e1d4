"""Single-file checkpoints: names against what the world calls them, round trips, refusals."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.published import write_sdxl_configs
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.io import names
from tlcm_jax.io.ldm_names import places
from tlcm_jax.io.single_file import layout_of, write_single_file


@pytest.fixture(scope="module", params=["sdxl", "sd"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(family, tmp_path_factory):
    folder = write_tiny_pipeline(tmp_path_factory.mktemp("teacher") / family, family=family)
    return load_model(folder, on_device=False)


@pytest.fixture
def checkpoint(teacher, family, tmp_path):
    path = tmp_path / "model.safetensors"
    write_single_file(path, teacher.params, family, "fp32", {"title": "tiny"})
    return path


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def test_round_trip_keeps_every_bit(teacher, checkpoint):
    again = load_model(checkpoint, config=teacher.source)
    jax.tree.map(np.testing.assert_array_equal, again.params, teacher.params)
    assert again.source == str(checkpoint) and again.folder == teacher.source
    (ours,), (theirs,) = (p.tokenize(["a red cat"])[:1] for p in (again, teacher))
    np.testing.assert_array_equal(ours, theirs)
    shapes = abstract_model(teacher.source, param_dtype=np.float16).params
    half = load_model(checkpoint, config=teacher.source, param_dtype=np.float16)
    jax.tree.map(
        lambda leaf, shape, whole: np.testing.assert_array_equal(
            np.asarray(leaf), np.asarray(whole).astype(shape.dtype)
        ),
        half.params, shapes, teacher.params,
    )  # fmt: skip


def test_configs_beside_the_file(teacher, checkpoint):
    source = write_tiny_pipeline(checkpoint.parent / "config", family=_family(teacher))
    assert load_model(checkpoint, on_device=False).folder == str(source)


def test_known_extras_and_unknown_ones(teacher, checkpoint):
    tower = "cond_stage_model" if _family(teacher) == "sd" else "conditioner.embedders.0"
    buffers = (
        "alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight",
        f"{tower}.transformer.text_model.embeddings.position_ids", "denoiser.sigmas",
        "conditioner.embedders.1.model.logit_scale",
    )  # fmt: skip
    rewrite(checkpoint, lambda tensors: tensors.update({b: np.zeros(3) for b in buffers}))
    load_model(checkpoint, config=teacher.source, on_device=False)
    rewrite(checkpoint, lambda tensors: tensors.update({"v_pred": np.zeros(0)}))
    with pytest.raises(ValueError, match="does not fit its config: unexpected v_pred"):
        load_model(checkpoint, config=teacher.source, on_device=False)


def test_missing_and_misshaped_tensors_have_the_files_names(teacher, checkpoint):
    def damage(tensors):
        del tensors["model.diffusion_model.input_blocks.2.0.op.weight"]
        tensors["model.diffusion_model.out.2.weight"] = np.zeros((4, 32, 1, 1), np.float32)

    rewrite(checkpoint, damage)
    with pytest.raises(ValueError) as error:
        load_model(checkpoint, config=teacher.source, on_device=False)
    assert str(error.value).endswith(
        "does not fit its config: missing model.diffusion_model.input_blocks.2.0.op.weight; "
        "model.diffusion_model.out.2.weight has shape (4, 32, 1, 1), expected (4, 32, 3, 3)"
    )


def test_files_that_are_no_checkpoint(teacher, checkpoint, tmp_path):
    def keep(tensors, prefix):
        for key in [key for key in tensors if not key.startswith(prefix)]:
            del tensors[key]

    rewrite(checkpoint, lambda tensors: keep(tensors, "model."))
    with pytest.raises(ValueError, match="a UNet but not the autoencoder and text encoders"):
        load_model(checkpoint, config=teacher.source)
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.conv_in.lora_A.weight": np.zeros((1, 1))}, lora)
    with pytest.raises(
        ValueError, match="no single-file checkpoint of a known family; it looks like a LoRA"
    ):
        load_model(lora)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="model.ckpt is a pickle.*convert_weights .*model.ckpt"):
        load_model(pickle)
    with pytest.raises(ValueError, match="is a single file, which has no variant 'fp16'"):
        load_model(checkpoint, variant="fp16")
    with pytest.raises(ValueError, match="is not a single file: it has configs of its own"):
        load_model(teacher.source, config=teacher.source)


def test_older_text_tower_and_linear_attention(checkpoint, teacher):
    """As in some merges of SD 1.x: no `text_model.`; attention stored as linear layers."""
    if _family(teacher) != "sd":
        pytest.skip("only SD 1.x files are found so")

    def older(tensors):
        for key in list(tensors):
            value = tensors.pop(key)
            if ".mid.attn_1." in key and value.ndim == 4:
                value = np.ascontiguousarray(value[:, :, 0, 0])
            tensors[key.replace("transformer.text_model.", "transformer.")] = value

    again = load_model(rewrite(checkpoint, older), config=teacher.source, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, again.params, teacher.params)


def test_names_of_the_published_file(tmp_path):
    """SDXL base's own file: 1680 UNet names, and some of each kind, known by heart."""
    sdxl = abstract_model(write_sdxl_configs(tmp_path))
    found = {
        component: places(component, names.to_torch_names(tree), "sdxl")
        for component, tree in sdxl.params.items()
    }
    unet = {place.key for place in found["unet"].values()}
    assert len(unet) == 1680
    blocks = {
        kind: sorted({int(n) for n in re.findall(rf"\.{kind}\.(\d+)\.", " ".join(unet))})
        for kind in ("input_blocks", "middle_block", "output_blocks")
    }
    assert blocks == {
        "input_blocks": list(range(9)), "middle_block": [0, 1, 2], "output_blocks": list(range(9)),
    }  # fmt: skip
    expected = {
        "unet": {
            "conv_in.weight": "input_blocks.0.0.weight",
            "time_embedding.linear_2.bias": "time_embed.2.bias",
            "add_embedding.linear_1.weight": "label_emb.0.0.weight",
            "down_blocks.0.resnets.1.time_emb_proj.weight": "input_blocks.2.0.emb_layers.1.weight",
            "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
            "down_blocks.1.resnets.0.conv_shortcut.weight": (
                "input_blocks.4.0.skip_connection.weight"
            ),
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight": (
                "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight"
            ),
            "mid_block.attentions.0.proj_out.bias": "middle_block.1.proj_out.bias",
            "mid_block.resnets.1.norm1.weight": "middle_block.2.in_layers.0.weight",
            "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.2.conv.bias",
            "up_blocks.1.attentions.2.norm.weight": "output_blocks.5.1.norm.weight",
            "up_blocks.2.resnets.2.conv2.weight": "output_blocks.8.0.out_layers.3.weight",
            "conv_norm_out.weight": "out.0.weight",
        },
        "vae": {
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": (
                "encoder.down.1.block.0.nin_shortcut.bias"
            ),
            "encoder.down_blocks.2.downsamplers.0.conv.weight": (
                "encoder.down.2.downsample.conv.weight"
            ),
            "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
            "decoder.mid_block.resnets.1.conv2.bias": "decoder.mid.block_2.conv2.bias",
            "decoder.up_blocks.0.resnets.2.norm1.weight": "decoder.up.3.block.2.norm1.weight",
            "decoder.up_blocks.2.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
            "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
            "post_quant_conv.weight": "post_quant_conv.weight",
        },
        "text_encoder": {
            name: name
            for name in (
                "text_model.encoder.layers.11.self_attn.q_proj.weight",
                "text_model.final_layer_norm.bias",
            )
        },
        "text_encoder_2": {
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.encoder.layers.31.self_attn.k_proj.weight": (
                "transformer.resblocks.31.attn.in_proj_weight"
            ),
            "text_model.encoder.layers.0.self_attn.out_proj.bias": (
                "transformer.resblocks.0.attn.out_proj.bias"
            ),
            "text_model.encoder.layers.7.mlp.fc2.bias": "transformer.resblocks.7.mlp.c_proj.bias",
            "text_model.final_layer_norm.weight": "ln_final.weight",
            "text_projection.weight": "text_projection",
        },
    }
    prefixes = {
        "unet": "model.diffusion_model.", "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }  # fmt: skip
    for component, pairs in expected.items():
        for name, key in pairs.items():
            assert found[component][name].key == prefixes[component] + key
    for component in ("unet", "vae", "text_encoder"):  # whole tensors: one place each
        keys = [place.key for place in found[component].values()]
        assert len(set(keys)) == len(keys)


def test_sd2_has_no_place():
    with pytest.raises(ValueError, match="SD 2.x cannot be written as a single file"):
        layout_of({"text_encoder": {"hidden_act": "gelu"}})


def test_names_without_a_place():
    with pytest.raises(ValueError, match="no place for the UNet's time_embedding.cond_proj"):
        places("unet", ["time_embedding.cond_proj.weight"], "sd")
    with pytest.raises(ValueError, match="no place for the text encoder's"):
        places("text_encoder_2", ["text_model.encoder.extra.weight"], "sdxl")


def _family(pipeline):
    return "sdxl" if len(pipeline.text_encoders) == 2 else "sd"


def test_tiny_names_are_found_by_an_independent_converter(teacher, checkpoint, family):
    """The UNet and VAE: diffusers' own converter maps the file back to the folder's names."""
    utils = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="needs diffusers: `verify`"
    )
    torch = pytest.importorskip("torch", reason="needs torch: the extra `verify`")
    stored = {key: torch.from_numpy(value) for key, value in load_file(checkpoint).items()}
    converters = {
        "unet": utils.convert_ldm_unet_checkpoint,
        "vae": utils.convert_ldm_vae_checkpoint,
    }
    for component, convert in converters.items():
        theirs = convert(dict(stored), dict(teacher.configs[component]))
        ours = names.to_torch(teacher.params[component])
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(theirs[name].numpy(), value, err_msg=name)
