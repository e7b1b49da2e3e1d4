"""A Chinese text encoder and its adapter in the place of SDXL's own, from files to images."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image
from safetensors.numpy import save_file

from tests.support.tiny_pipeline import random_params, write_tiny_pipeline
from tlcm_jax import sample
from tlcm_jax.families.base import abstract_params
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import generate
from tlcm_jax.io import names
from tlcm_jax.io.json_files import write_json
from tlcm_jax.models.chinese_clip import ChineseCLIPTextConfig, ChineseCLIPTextModel
from tlcm_jax.models.text_adapter import TextAdapter, TextAdapterConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只红色的猫"]
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 30,
    "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": len(WORDS),
}  # fmt: skip


def write_adapter(folder, pooled=16, sequence=32, width=16):
    """Of the tiny pipeline's widths unless others are asked for."""
    tower = ChineseCLIPTextModel(ChineseCLIPTextConfig.from_dict(TEXT))
    adapter = TextAdapter(
        TextAdapterConfig(
            in_width=width, hidden_width=24, pooled_width=pooled, sequence_width=sequence
        )
    )
    folder.mkdir()
    params = [
        random_params(abstract_params(network), np.random.default_rng(seed))
        for seed, network in enumerate((tower, adapter))
    ]
    tensors = {f"text_model.{name}": value for name, value in names.to_torch(params[0]).items()}
    # What else Chinese-CLIP's file holds, and is not read.
    tensors["text_projection.weight"] = np.zeros((8, 16), np.float32)
    tensors["vision_model.pre_layrnorm.bias"] = np.zeros(4, np.float32)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    own = {k: np.ascontiguousarray(v) for k, v in names.to_torch(params[1]).items()}
    save_file(own, folder / "text_adapter.safetensors")
    write_json(folder / "config.json", {"model_type": "chinese_clip", "text_config": TEXT})
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tower, adapter, params


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_model(write_tiny_pipeline(tmp_path_factory.mktemp("m") / "tiny"))


def test_its_states_condition_the_unet(base, tmp_path):
    tower, adapter, params = write_adapter(tmp_path / "zh")
    model = base.with_text_adapter(tmp_path / "zh")
    ids = np.full((1, 30), 0, np.int32)
    ids[0, :8] = [2, *range(5, 11), 3]  # begin, six characters, end
    np.testing.assert_array_equal(model.tokenize(["一只红色的猫"])[0], ids)
    states = tower.apply({"params": params[0]}, jnp.asarray(ids))
    sequence, pooled = adapter.apply({"params": params[1]}, states)
    found = model.encode(["一只红色的猫"])
    np.testing.assert_allclose(found.prompt_embeds, sequence, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert found.time_ids.shape == (1, 6)
    # Guidance moves away from the adapter's own empty prompt, not from zeros.
    assert np.any(np.asarray(model.null_conditioning().pooled))


def test_sample_draws_by_it(base, tmp_path):
    write_adapter(tmp_path / "zh")
    values, output = flags.FlagValues(), tmp_path / "out.png"
    sample.define_flags(values)
    words = ["--model", base.source, "--adapter", str(tmp_path / "zh"), "--prompt", "红色的猫"]
    values(["sample", *words, "--steps=2", "--output", str(output)])
    sample.run(values)
    drawn = generate(base.with_text_adapter(tmp_path / "zh"), ["红色的猫"], 2, seed=0)
    np.testing.assert_array_equal(np.asarray(Image.open(output)), drawn[0])
    assert np.mean(generate(base, ["红色的猫"], 2, seed=0) != drawn) > 0.3


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"width": 20}, "reads states 20 wide, but its text encoder has 16"),
        ({"pooled": 12}, "gives a pooled output 12 wide, but the model has 16"),
        ({"sequence": 48}, "gives a sequence 48 wide, but the model has 32"),
    ],
)
def test_an_adapter_of_another_width_is_refused(base, tmp_path, sizes, said):
    write_adapter(tmp_path / "zh", **sizes)
    with pytest.raises(ValueError, match=said) as caught:
        base.with_text_adapter(tmp_path / "zh")
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        base.with_text_adapter(tmp_path / "zh")
    write_adapter(tmp_path / "zh")
    with pytest.raises(ValueError, match="one encoder, which reads one chunk"):
        base.with_text_adapter(tmp_path / "zh").tokenize(["猫"], ["猫"])
    (tmp_path / "zh" / "text_adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no text_adapter.safetensors"):
        base.with_text_adapter(tmp_path / "zh")
    save_file({"layernorm.weight": np.zeros(3)}, tmp_path / "zh" / "text_adapter.safetensors")
    with pytest.raises(ValueError, match="is no text adapter"):
        base.with_text_adapter(tmp_path / "zh")


def test_a_model_of_one_text_encoder_takes_none(tmp_path):
    write_adapter(tmp_path / "zh")
    model = load_model(write_tiny_pipeline(tmp_path / "sd", family="sd"))
    with pytest.raises(ValueError, match="is not SDXL"):
        model.with_text_adapter(tmp_path / "zh")
