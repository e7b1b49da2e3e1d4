"""The reader of JSON: what is no JSON, what no config has, and that each message names its file."""

import dataclasses
import json

import pytest

from tests.support.tiny_pipeline import TOWER, UNET, VAE
from tlcm_jax.io.json_files import parse, read_json, read_object
from tlcm_jax.models.clip_text import CLIPTextConfig
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import VAEConfig


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is too large a number"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ("[]", "must hold a JSON object, not a list"),
        ("null", "must hold a JSON object, not a NoneType"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_what_is_no_object(tmp_path, text, message):
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_object(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_text(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="x.json is not valid JSON"):
        read_object(file)
    file.write_text("[" + "0," * 100 + "0]")
    assert read_json(file) == [0] * 101
    with pytest.raises(ValueError, match="x.json has 203 bytes; at most 100 are read"):
        read_json(file, max_bytes=100)
    with pytest.raises(FileNotFoundError, match="x.json is missing; the judge is not whole"):
        read_json(tmp_path / "no" / "x.json", "judge")


def config(**changes):
    return {**UNET, **changes}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (config(sample_size="64"), "sample_size = '64': must be int . tuple"),
        (config(sample_size=10**6), "sample_size = 1000000: must be at most 16384"),
        (config(layers_per_block=2.5), "not of the type it must have"),
        (config(norm_num_groups=-8), "norm_num_groups = -8: must be int of at least 0"),
        (config(layers_per_block=10**9), "layers_per_block = 1000000000: must be at most 200"),
        (config(transformer_layers_per_block=[1, 1000]), "must be at most 200"),
        (config(layers_per_block=150, transformer_layers_per_block=100), "over the 400 that are"),
        (config(block_out_channels=[32] * 17), "block_out_channels holds 17 values, over 16"),
        (config(cross_attention_dim=10**30), "must be at most 1000000"),
        (config(flip_sin_to_cos="no"), "flip_sin_to_cos = 'no': must be bool"),
        (config(flip_sin_to_cos=1), "flip_sin_to_cos = 1: must be bool"),
        (config(use_linear_projection=[]), r"use_linear_projection = \[\]: must be bool"),
        (config(norm_eps="small"), "norm_eps = 'small': must be float"),
        (config(norm_eps=None), "norm_eps = None: must be float"),
        (config(block_out_channels=None), "not of the type it must have"),
        (config(time_cond_proj_dim=[1]), r"time_cond_proj_dim = \[1\]: must be int | None"),
        (
            {k: v for k, v in UNET.items() if k != "block_out_channels"},
            "down_block_types=.* needs 4 values",
        ),
    ],
)
def test_what_no_config_has(tmp_path, raw, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(tmp_path / "config.json", json.loads(json.dumps(raw)), UNetConfig.from_dict)
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert len(str(error.value).splitlines()) == 1


def test_whole_numbers_pass_for_floats_and_truth_values_for_no_number(tmp_path):
    tower = {**TOWER, "hidden_size": 8, "layer_norm_eps": 1}
    assert parse(tmp_path, tower, CLIPTextConfig.from_dict).layer_norm_eps == 1
    with pytest.raises(ValueError, match="num_hidden_layers = True: must be int"):
        parse(tmp_path, {**tower, "num_hidden_layers": True}, CLIPTextConfig.from_dict)


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        (dict(eos_token_id=1000), "eos_token_id = 1000: must be a token of its vocabulary of 1000"),
        (dict(bos_token_id=-1), "bos_token_id = -1: must be a token"),
        (dict(pad_token_id="0"), "pad_token_id = 0: must be a token"),
        (dict(eos_token_id=True), "eos_token_id = True: must be a token"),
        ({}, "eos_token_id = 49407: must be a token"),  # the class's default
    ],
)
def test_marks_of_a_text_lie_in_the_vocabulary(tmp_path, marks, said):
    whole = {**TOWER, "hidden_size": 8, "vocab_size": 1000, "eos_token_id": 999}
    tower = {key: value for key, value in whole.items() if marks or key != "eos_token_id"}
    assert parse(tmp_path, whole, CLIPTextConfig.from_dict)
    with pytest.raises(ValueError, match=said):
        parse(tmp_path, tower | marks, CLIPTextConfig.from_dict)


@pytest.mark.parametrize(
    "name", ["use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"]
)
def test_switches_of_an_autoencoder_are_truth_values(tmp_path, name):
    assert parse(tmp_path, VAE | {name: False}, VAEConfig.from_dict)
    with pytest.raises(ValueError, match=f"{name} = 'false': must be bool|not of the type it must"):
        parse(tmp_path, VAE | {name: "false"}, VAEConfig.from_dict)


def test_fields_of_fields_are_checked(tmp_path):
    @dataclasses.dataclass
    class Inner:
        count: int

    @dataclasses.dataclass
    class Outer:
        inner: Inner
        names: tuple[str, ...] = ()

    def outer(raw):
        return Outer(inner=Inner(**raw["inner"]), names=tuple(raw.get("names", ())))

    assert parse(tmp_path, {"inner": {"count": 3}, "names": ["a"]}, outer).inner.count == 3
    with pytest.raises(ValueError, match="count = 'x': must be int"):
        parse(tmp_path, {"inner": {"count": "x"}}, outer)
    with pytest.raises(ValueError, match="names = .*: must be tuple"):
        parse(tmp_path, {"inner": {"count": 1}, "names": [1]}, outer)
