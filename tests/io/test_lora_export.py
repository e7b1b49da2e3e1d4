"""LoRA files that are written: names, layouts, scale, header; and that they are read back."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.loras import RANK, TO_OUT, assert_equal, read_lora, write_lora
from tlcm_jax.models import lora


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_round_trip_keeps_every_bit(tmp_path, unet, adapter, dialect):
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect=dialect)
    assert_equal(read_lora(path, unet), adapter)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), unet)
    assert_equal(read_lora(path, shapes), adapter)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)], ids=["fp16", "bf16"]
)
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_half_precision_rounds_once(tmp_path, unet, adapter, dialect, dtype, kind):
    path = write_lora(tmp_path / "lora.safetensors", adapter, dialect=dialect, dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(np.float32), adapter)
    assert_equal(read_lora(path, unet), rounded)


def test_names_and_layouts_of_diffusers(tmp_path, adapter):
    stored = load_file(write_lora(tmp_path / "lora.safetensors", adapter))
    assert len(stored) == 2 * 7
    conv = "unet.down_blocks.0.resnets.0.conv1"
    assert stored[f"{conv}.lora_A.weight"].shape == (RANK, 4, 3, 3)
    assert stored[f"{conv}.lora_B.weight"].shape == (8, RANK, 1, 1)
    assert stored[f"unet.{TO_OUT}.lora_A.weight"].shape == (RANK, 8)
    down = adapter["down_blocks.0"]["resnets.0"]["conv1"]["lora_A"]
    np.testing.assert_array_equal(stored[f"{conv}.lora_A.weight"][1, 2], down[:, :, 2, 1])


def test_names_and_alphas_of_kohya(tmp_path, adapter):
    stored = load_file(write_lora(tmp_path / "lora.safetensors", adapter, dialect="kohya"))
    assert len(stored) == 3 * 7
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_attn1_to_out_0"
    assert stored[f"{name}.lora_down.weight"].shape == (RANK, 8)
    assert stored[f"{name}.alpha"].shape == () and stored[f"{name}.alpha"] == RANK


def test_written_scale_is_one_whatever_alpha_was_trained(tmp_path, unet, adapter):
    path = write_lora(tmp_path / "lora.safetensors", lora.scaled(adapter, 0.125))
    assert_equal(read_lora(path, unet), lora.scaled(adapter, 0.125))


def test_metadata_and_mode(tmp_path, adapter):
    path = write_lora(tmp_path / "lora.safetensors", adapter, metadata={"teacher": "emoji-xl"})
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(header)["__metadata__"] == {"format": "pt", "teacher": "emoji-xl"}
    other = tmp_path / "other"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


def test_values_that_the_file_cannot_hold(tmp_path, adapter):
    layer = adapter["mid_block"]["resnets.0"]["conv_shortcut"]
    layer["lora_B"][0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="conv_shortcut.lora_B.weight .* fp16 cannot"):
        write_lora(tmp_path / "lora.safetensors", adapter, dtype="fp16")
    write_lora(tmp_path / "lora.safetensors", adapter, dtype="bf16")
    layer["lora_B"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        write_lora(tmp_path / "nan.safetensors", adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
