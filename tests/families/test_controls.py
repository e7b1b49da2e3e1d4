"""Control networks: folders, hub ids, single files of every layout, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest

from tests.support.controls import TINY_ADAPTER, tiny_controlnet, write_control
from tests.support.tiny_pipeline import SD_UNET, UNET, write_tiny_pipeline
from tlcm_jax.families.load import load_model
from tlcm_jax.io import control_files
from tlcm_jax.io.files import save_tensors
from tlcm_jax.io.ldm_names import controlnet_places
from tlcm_jax.io.tensors import TensorFile
from tlcm_jax.models.conditioning import Residuals

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = tiny_controlnet(UNET) | {
    "down_block_types": ["DownBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return load_model(write_tiny_pipeline(tmp_path_factory.mktemp("models") / "sdxl"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return load_model(write_tiny_pipeline(tmp_path_factory.mktemp("models") / "sd", family="sd"))


def tensors_of(folder):
    file = TensorFile([folder / WEIGHTS])
    return {name: np.array(file[name]) for name in file}


def assert_same(first, second):
    assert first.network == second.network
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


@pytest.mark.parametrize("config", [tiny_controlnet(UNET), SMALL, TINY_ADAPTER])
def test_a_file_alone_is_its_folder(sdxl, tmp_path, config):
    folder = write_control(tmp_path / "control", config)
    whole = sdxl.load_control(folder)
    file = (folder / WEIGHTS).rename(tmp_path / "control.safetensors")
    alone = sdxl.load_control(file)
    assert_same(alone, whole)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_file_by_its_authors_names(sd, tmp_path, prefix):
    folder = write_control(tmp_path / "control", tiny_controlnet(SD_UNET))
    stored = tensors_of(folder)
    moved = {place.key: stored[name] for name, place in controlnet_places(stored, prefix).items()}
    assert f"{prefix}input_hint_block.10.weight" in moved  # of six convolutions the last
    assert f"{prefix}zero_convs.3.0.bias" in moved and f"{prefix}middle_block_out.0.bias" in moved
    if prefix:
        moved["model.diffusion_model.out.2.bias"] = np.zeros(4, np.float32)
    save_tensors(tmp_path / "control.safetensors", moved)
    assert_same(sd.load_control(tmp_path / "control.safetensors"), sd.load_control(folder))


def test_of_a_hub_id_config_and_one_set_of_weights_are_fetched(sdxl, tmp_path, monkeypatch):
    folder = write_control(tmp_path / "control", tiny_controlnet(UNET))
    asked = []

    def fetch(source, choose):
        listed = ["README.md", "config.json", WEIGHTS, WEIGHTS.replace(".safe", ".fp16.safe")]
        asked.append((source.repository, choose(listed)))
        return folder

    monkeypatch.setattr(control_files, "fetch_files", fetch)
    assert_same(sdxl.load_control("someone/canny"), sdxl.load_control(folder))
    assert asked == [("someone/canny", ["config.json", WEIGHTS])]
    with pytest.raises(FileNotFoundError, match="no control network's config.json"):
        control_files._needed(["README.md", "model.pth"])


def test_what_is_of_another_family_is_refused(sd, sdxl, tmp_path):
    of_sd = write_control(tmp_path / "sd", tiny_controlnet(SD_UNET))
    of_sdxl = write_control(tmp_path / "sdxl", tiny_controlnet(UNET))
    with pytest.raises(ValueError, match="another family than the model: text_time .* False"):
        sdxl.load_control(of_sd)
    with pytest.raises(ValueError, match="another family than the model: text_time .* True"):
        sd.load_control(of_sdxl)
    narrow = write_control(tmp_path / "text", tiny_controlnet(UNET | {"cross_attention_dim": 24}))
    with pytest.raises(ValueError, match="text states of width 24, the model's 32"):
        sdxl.load_control(narrow)
    eight = tiny_controlnet(UNET) | {"conditioning_embedding_out_channels": [8, 8, 8, 8]}
    with pytest.raises(ValueError, match="makes one of 8 pixels a side, .* one of 4"):
        sdxl.load_control(write_control(tmp_path / "eight", eight))
    wide = write_control(tmp_path / "wide", TINY_ADAPTER | {"channels": [16, 64]})
    with pytest.raises(ValueError, match=r"T2I-Adapter of another family .*\[16, 64\] at 1/8"):
        sdxl.load_control(wide)


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "holds a ControlNetUnionModel; only a plain"),
        ({"_class_name": "ControlNetXSAdapter"}, "holds a ControlNetXSAdapter; only a plain"),
        ({"global_pool_conditions": True}, "global_pool_conditions=True is not supported"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "neither 'rgb' nor 'bgr'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ({"conditioning_channels": "three"}, "conditioning_channels = 'three': must be int"),
        ({"layers_per_block": 2}, "layers a block (2, 2), the model's (1, 1)"),
        ({"_class_name": "T2IAdapter", "adapter_type": "huge"}, "adapter_type='huge' is not one"),
        ({"_class_name": "T2IAdapter", "num_res_blocks": 1000}, "residual blocks"),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(sdxl, tmp_path, fields, said):
    folder = changed(write_control(tmp_path / "control", tiny_controlnet(UNET)), **fields)
    with pytest.raises(ValueError, match=re.escape(said)):
        sdxl.load_control(folder)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("task_embedding", "a union ControlNet"),
        ("base_to_ctrl.0.weight", "a ControlNet-XS"),
        ("lora_controlnet", "a Control-LoRA"),
        ("lllite_unet_a.down.0.weight", "a ControlLLLite"),
        ("adapter.body.0.block1.weight", "by its authors' own names"),
    ],
)
def test_files_of_other_networks_are_told_apart(sdxl, tmp_path, extra, said):
    stored = tensors_of(write_control(tmp_path / "control", tiny_controlnet(UNET)))
    save_tensors(tmp_path / "file.safetensors", stored | {extra: np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=said):
        sdxl.load_control(tmp_path / "file.safetensors")


def test_what_is_no_control_network_is_refused(sdxl, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file, folder or hub id"):
        sdxl.load_control(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no config.json of a control network"):
        sdxl.load_control(tmp_path)
    with pytest.raises(ValueError, match="names an autoencoder alone"):
        save_tensors(tmp_path / "vae.safetensors", {"encoder.conv_in.weight": np.zeros(3)})
        sdxl.load_control(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="is a pickle"):
        (tmp_path / "canny.pth").write_bytes(b"\x80\x02")
        sdxl.load_control(tmp_path / "canny.pth")
    folder = write_control(tmp_path / "control", tiny_controlnet(UNET))
    stored = tensors_of(folder)
    save_tensors(folder / WEIGHTS, {k: v for k, v in stored.items() if "mid_block" not in k})
    with pytest.raises(ValueError, match="does not fit its config: missing controlnet_mid_block"):
        sdxl.load_control(folder)


def test_residuals_of_several_are_added_and_of_unlike_ones_are_not():
    a, b = np.ones((1, 2, 2, 3)), np.full((1, 2, 2, 3), 2.0)
    both = Residuals(down=(a,), mid=a).plus(Residuals(down=(b,), mid=b))
    assert both.down[0].min() == both.mid.max() == 3
    mixed = Residuals(adapter_features=(a,)).plus(both)
    assert mixed.down is both.down and mixed.mid is both.mid and mixed.adapter_features == (a,)
    with pytest.raises(ValueError, match="two control networks .* unlike shapes"):
        both.plus(Residuals(down=(a, a), mid=b))
