"""LoRA files of other programs: what is read of them, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.loras import RANK, TO_OUT, assert_equal, flat, read_lora, write_lora
from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.io import lora_files, lora_stack
from tlcm_jax.io.lora_names import kohya_name
from tlcm_jax.models import lora


def read_loras(specs, networks):
    read = [(path, weight) for path, weight in map(lora_stack.split_weight, specs)]
    return lora_stack.combine(
        [(lora_files.read_networks(path, networks, LORA_NAMES), weight) for path, weight in read]
    )


# Reading other programs' scales.


def rewrite(path, change, metadata=None):
    """The file at `path` with `change(tensors)` done to it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    return path


def test_kohya_alpha_scales(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect="kohya")

    def halve(tensors):
        for key in [key for key in tensors if key.endswith(".alpha")]:
            tensors[key] = np.asarray(RANK / 2, np.float32)

    assert_equal(read_lora(rewrite(path, halve), unet), lora.scaled(adapter, np.float32(0.5)))


def test_kohya_without_alpha_has_scale_one(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect="kohya")

    def drop(tensors):
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]

    assert_equal(read_lora(rewrite(path, drop), unet), adapter)


def test_diffusers_alpha_in_the_header_scales(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    config = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {f"^{TO_OUT}": 12}}
    rewrite(path, lambda tensors: None, {"lora_adapter_metadata": json.dumps(config)})
    ours, plain = flat(read_lora(path, unet)), flat(adapter)
    for layer, value in plain.items():
        scale = {"lora_A": 1, "lora_B": 4 if "to_out.0" in layer else 2}[layer[-1]]
        np.testing.assert_array_equal(ours[layer], scale * value)


def peft_folder(folder, adapter, **config):
    folder.mkdir()
    stored = load_file(write_lora(folder.parent / "plain.safetensors", adapter))
    renamed = {key.replace("unet.", "base_model.model.", 1): value for key, value in stored.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / RANK),
        ({"lora_alpha": 6}, 2),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
    ],
    ids=["PEFT's default alpha", "alpha", "rank-stabilised"],
)
def test_peft_folder(tmp_path, unet, adapter, config, scale):
    folder = peft_folder(tmp_path / "adapter", adapter, r=RANK, **config)
    expected = jax.tree.map(np.asarray, lora.scaled(adapter, np.float32(scale)))
    assert_equal(read_lora(folder, unet), expected)


def test_folder_as_diffusers_saves_it(tmp_path, unet, adapter):
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", adapter)
    assert_equal(read_lora(tmp_path, unet), adapter)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")),
        (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_A.default.weight", ".lora_B.default.weight"),
        ),
        (("unet.",), ("unet.base_model.model.",)),
    ],
    ids=["diffusers' former names", "PEFT's adapter name", "PEFT's prefix inside diffusers'"],
)
def test_other_spellings(tmp_path, unet, adapter, old, new):
    path = write_lora(tmp_path / "lora.safetensors", adapter)

    def respell(tensors):
        for key in list(tensors):
            value = tensors.pop(key)
            for former, latter in zip(old, new, strict=True):
                key = key.replace(former, latter)
            tensors[key] = value

    assert_equal(read_lora(rewrite(path, respell), unet), adapter)


def test_kohya_with_the_names_of_single_files(tmp_path, unet, adapter):
    """As kohya's trainer writes for SDXL."""
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect="kohya")
    block = "lora_unet_input_blocks_1_"
    names = {
        "lora_unet_down_blocks_0_resnets_0_conv1": block + "0_in_layers_2",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj": block + "0_emb_layers_1",
        "lora_unet_mid_block_resnets_0_conv_shortcut": "lora_unet_middle_block_0_skip_connection",
        "lora_unet_down_blocks_0_attentions_0": block + "1",
    }

    def respell(tensors):
        for key in list(tensors):
            former = next(name for name in names if key.startswith(name))
            tensors[key.replace(former, names[former])] = tensors.pop(key)

    rewrite(path, respell)
    assert f"{block}1_transformer_blocks_1_attn1_to_out_0.alpha" in load_file(path)
    assert_equal(read_lora(path, unet), adapter)


def test_several_with_weights(tmp_path, unet, adapter):
    first = write_lora(tmp_path / "first.safetensors", adapter)
    half = {"mid_block": lora.scaled(adapter["mid_block"], np.float32(3))}
    second = write_lora(tmp_path / "second.safetensors", half, dialect="kohya")
    both = read_loras([f"{first}:0.5", f"{second}:-2", str(first)], {"unet": unet})["unet"]
    merged = flat(lora.merge(unet, both))
    for path, kernel in flat(unet).items():
        weight = 1.5 - 6 * (path[0] == "mid_block")
        one = flat(lora.merge(unet, adapter, weight))[path]
        np.testing.assert_allclose(merged[path], one, rtol=1e-5, atol=1e-6, err_msg=str(path))
        assert path[-1] != "kernel" or merged[path].shape == kernel.shape
    assert_equal(read_loras([str(first)], {"unet": unet})["unet"], adapter)
    colon = tmp_path / "name:2"  # a path of its own, not a weight
    colon.write_bytes(first.read_bytes())
    assert_equal(read_loras([str(colon)], {"unet": unet})["unet"], adapter)
    with pytest.raises(FileNotFoundError, match="first.safetensors:much' does not exist"):
        read_loras([f"{first}:much"], {"unet": unet})


# What is refused.


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_values_that_are_not_finite(tmp_path, unet, adapter, part):
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect="kohya")

    def damage(tensors):
        tensors[f"lora_unet_mid_block_resnets_0_conv_shortcut.{part}"][...] = np.nan

    with pytest.raises(ValueError, match="conv_shortcut holds values that are not finite"):
        read_lora(rewrite(path, damage), unet)


def test_factors_of_integers(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect="kohya")
    key = "lora_unet_mid_block_resnets_0_conv_shortcut"

    def round_off(tensors):
        tensors[f"{key}.alpha"] = np.array(RANK, np.int64)
        tensors[f"{key}.lora_up.weight"] = tensors[f"{key}.lora_up.weight"].astype(np.int8)

    with pytest.raises(ValueError, match=f"model: {key}.lora_up.weight is of int8, quantised"):
        read_lora(rewrite(path, round_off), unet)


@pytest.mark.parametrize("weight", ["nan", "inf", "1e39"])
def test_a_lora_s_weight_is_a_number(tmp_path, unet, adapter, weight):
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    with pytest.raises(ValueError, match=f"{weight}: its weight must be a number"):
        read_loras([f"{path}:{weight}"], {"unet": unet})


def test_ten_unmatched_keys_are_named_and_nothing_is_skipped(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter)

    def add(tensors):
        for i in range(12):
            tensors[f"unet.up_blocks.{i:02}.conv1.lora_A.weight"] = np.zeros((3, 4), np.float32)

    with pytest.raises(ValueError, match="match no layer of unet") as error:
        read_lora(rewrite(path, add), unet)
    assert "up_blocks.09" in str(error.value) and "up_blocks.10" not in str(error.value)
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "unet.conv1.lora_A.weight",
        f"unet.{TO_OUT}.lora_C.weight",
    ],
    ids=["text encoder", "only a name's ending", "no part"],
)
def test_unmatched_key(tmp_path, unet, adapter, key):
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    rewrite(path, lambda tensors: tensors.update({key: np.zeros((3, 8), np.float32)}))
    with pytest.raises(ValueError, match="match no layer of unet: " + key.replace(".", r"\.")):
        read_lora(path, unet)


def test_ambiguous_kohya_name(tmp_path):
    kernel = {"kernel": np.zeros((4, 4), np.float32)}
    unet = {"a_b": {"c": kernel}, "a": {"b_c": kernel}}
    factors = {"lora_A": np.ones((4, 1), np.float32), "lora_B": np.ones((1, 4), np.float32)}
    assert kohya_name(("a_b", "c"), "x_") == kohya_name(("a", "b_c"), "x_") == "x_a_b_c"
    path = write_lora(tmp_path / "one.safetensors", {"a_b": {"c": factors}}, dialect="kohya")
    with pytest.raises(ValueError, match="may be a_b.c and a.b_c"):
        read_lora(path, unet)
    both = {"a_b": {"c": factors}, "a": {"b_c": factors}}
    with pytest.raises(ValueError, match="two layers are called lora_unet_a_b_c"):
        write_lora(tmp_path / "two.safetensors", both, dialect="kohya")
    plain = write_lora(tmp_path / "three.safetensors", both)
    assert_equal(read_lora(plain, unet), both)


def test_half_a_layer(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    rewrite(path, lambda tensors: tensors.pop(f"unet.{TO_OUT}.lora_B.weight"))
    with pytest.raises(ValueError, match=r"attn1\.to_out\.0 has only lora_A"):
        read_lora(path, unet)


def test_factors_of_another_network(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    unet["down_blocks.0"]["resnets.0"]["time_emb_proj"]["kernel"] = np.zeros((32, 8), np.float32)
    with pytest.raises(ValueError, match=r"time_emb_proj has lora_A .* for a weight \(8, 32\)"):
        read_lora(path, unet)


def test_one_layer_in_two_dialects(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    other = load_file(write_lora(tmp_path / "kohya.safetensors", adapter, dialect="kohya"))
    with pytest.raises(ValueError, match="twice, in two dialects"):
        read_lora(rewrite(path, lambda tensors: tensors.update(other)), unet)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused_with_the_command_that_converts(tmp_path, unet, suffix):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="is a pickle.*tlcm_jax.io.convert_weights .*lora"):
        read_lora(path, unet)


def test_pickled_adapter_folder(tmp_path, unet):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        read_lora(tmp_path, unet)


def test_broken_inputs(tmp_path, unet, adapter):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_lora(tmp_path / "nowhere.safetensors", unet)
    with pytest.raises(FileNotFoundError, match="neither adapter_config.json nor"):
        read_lora(tmp_path, unet)
    path = write_lora(tmp_path / "lora.safetensors", adapter)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_lora(path, unet)
    folder = peft_folder(tmp_path / "adapter", adapter)
    with pytest.raises(FileNotFoundError, match="give one of .*/adapter$"):
        read_lora(tmp_path, unet)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not valid JSON"):
        read_lora(folder, unet)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "of kind IA3 .peft_type.; LoRA, DoRA, LoCon, LoHa and LoKr are r"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out are not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "begun by 'pissa_niter_4' goes with weights th"),
        ({"lora_alpha": "much"}, "must hold numbers"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "not a plain layer name"),
    ],
)
def test_unsupported_adapter_configs(tmp_path, unet, adapter, config, message):
    folder = peft_folder(tmp_path / "adapter", adapter, **config)
    with pytest.raises(ValueError, match=message):
        read_lora(folder, unet)
