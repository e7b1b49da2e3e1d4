"""A text adapter learns from pairs of prompts, from files to the folder that `sample` reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from tests.families.test_text_adapter import write_adapter
from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax import paths
from tlcm_jax import train_text_adapter as command
from tlcm_jax.distillation.text_transfer import transfer_loss
from tlcm_jax.families.load import load_model
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.models import lora


def test_the_loss_is_its_three_parts():
    rng = np.random.default_rng(0)
    a, b, e = (jnp.asarray(rng.standard_normal((3, 4, 4, 2))) for _ in range(3))
    f = {"mid_block": a, "up_blocks.0": b}
    g = {"mid_block": b, "up_blocks.0": e}
    found, parts = transfer_loss(a, b, e, f, g)

    def mean(x):
        return np.mean(np.square(x), axis=(1, 2, 3))

    expected = mean(a - e) + mean(a - b) + 0.1 * (mean(a - b) + mean(b - e))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert set(parts) == {"noise", "prediction", "features"}
    with pytest.raises(ValueError, match="states of"):
        transfer_loss(a, b, e, f, {"mid_block": b})


def test_all_seven_kinds_of_states_are_the_unet_s_own(tmp_path):
    model = load_model(write_tiny_pipeline(tmp_path / "tiny"))
    z, t = jax.random.normal(jax.random.key(0), (1, 8, 8, 4)), jnp.full(1, 500)
    conditioning, unet = model.encode(["a cat"]), model.params["unet"]
    prediction, states = model.predict_states(unet, z, t, conditioning)
    np.testing.assert_allclose(prediction, model.predict(unet, z, t, conditioning), atol=1e-5)
    blocks = {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert set(states) == blocks
    features = model.predict(unet, z, t, conditioning, features=True)
    np.testing.assert_allclose(states["mid_block"], features["mid_block"], atol=1e-5)


@pytest.mark.slow
def test_the_command_trains_from_pairs_alone(tmp_path, capsys):
    model = load_model(write_tiny_pipeline(tmp_path / "tiny"))
    fresh = lora.init(model.params["unet"], ("to_q", "to_v"), 2, jax.random.key(0))
    adapter = random_adapter(fresh, np.random.default_rng(0), 0.1)
    write_lora(tmp_path / "s.safetensors", adapter, model.lora_names, dtype="fp32", metadata={})
    write_adapter(tmp_path / "clip")
    (tmp_path / "clip" / "text_adapter.safetensors").unlink()
    (tmp_path / "pairs.tsv").write_text("a cat\t猫\na red cat\t红色的猫\n", encoding="utf-8")
    values = flags.FlagValues()
    command.define_flags(values)
    words = {
        "model": tmp_path / "tiny", "lora": tmp_path / "s.safetensors", "steps": 30, "batch": 2,
        "text_encoder": tmp_path / "clip", "pairs": tmp_path / "pairs.tsv", "sample_steps": 1,
        "output": tmp_path / "zh", "workdir": tmp_path / "run", "learning_rate": 3e-3,
    }  # fmt: skip
    values(["command", *(f"--{name}={value}" for name, value in words.items())])
    command.run(values)

    english, drawn = model.encode(["a red cat"]), {}
    start = model.with_new_text_adapter(tmp_path / "clip", jax.random.key(0))
    for name, each in (("fresh", start), ("trained", model.with_text_adapter(tmp_path / "zh"))):
        z, t = jax.random.normal(jax.random.key(1), (1, 8, 8, 4)), jnp.full(1, 500)
        unet, other = model.params["unet"], each.encode(["红色的猫"])
        difference = each.predict(unet, z, t, other) - model.predict(unet, z, t, english)
        drawn[name] = float(jnp.mean(jnp.square(difference)))
    assert drawn["trained"] < 0.8 * drawn["fresh"]
    assert "written to" in capsys.readouterr().out


def test_a_line_that_is_no_pair_is_named(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("# English, Chinese\na cat\t猫\na dog\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: must be the English prompt"):
        command.read_pairs(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no pairs"):
        command.read_pairs(file)


def given(*words):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["command", *words])
    command.take_config(values)
    return values


def test_the_recipe_of_sdxl_is_read_and_flags_stand_above_it(tmp_path):
    recipe = f"--config={paths.ROOT / 'configs' / 'sdxl_zh.py'}"
    values = given(recipe, "--pairs=p.tsv", "--output=zh", "--steps=7")
    assert values.model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (values.pairs, values.output, values.steps, values.batch) == ("p.tsv", "zh", 7, 16)
    # PEA-Diffusion's.
    assert (values.learning_rate, values.weight_decay) == (1e-5, 0.1)
    assert (values.unconditional, values.feature_weight, values.hidden_width) == (0.1, 0.1, 2048)
    with pytest.raises(ValueError, match="give --pairs, or a --config that has it"):
        given(recipe, "--output=zh")
    odd = tmp_path / "odd.py"
    odd.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict(dict(learning_rat=1.0))\n"
    )
    with pytest.raises(ValueError, match="'learning_rat' is no flag of this command"):
        given(f"--config={odd}")
