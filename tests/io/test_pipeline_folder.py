"""Pipeline folders: written and read back bit for bit, and half ones refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from tlcm_jax.families.load import load_model
from tlcm_jax.io.pipeline_folder import lcm_scheduler, write_pipeline
from tlcm_jax.io.tensors import open_component


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_model(tiny, on_device=False)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def test_round_trip_keeps_every_bit(teacher, tmp_path):
    unet = jax.tree.map(lambda x: x + np.float32(1e-3), teacher.params["unet"])
    folder = write_pipeline(teacher, tmp_path / "student", unet=unet, extra={"README.md": "card"})
    student = load_model(folder, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, student.params, {**teacher.params, "unet": unet})
    np.testing.assert_array_equal(student.schedule.alphas, teacher.schedule.alphas)
    prompts = ["a red cat", ""]
    for ours, theirs in zip(student.tokenize(prompts), teacher.tokenize(prompts), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (folder / "README.md").read_text() == "card"
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "LCMScheduler",
    ]
    with pytest.raises(FileExistsError, match="already holds files"):
        write_pipeline(teacher, folder)


def test_scheduler_is_the_teachers_noise_and_the_students_steps():
    config = lcm_scheduler(
        {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear",
         "beta_start": 0.001, "beta_end": 0.01, "prediction_type": "v_prediction",
         "steps_offset": 1, "use_karras_sigmas": True}
    )  # fmt: skip
    assert config["_class_name"] == "LCMScheduler" and config["original_inference_steps"] == 8
    assert config["beta_schedule"] == "scaled_linear" and config["beta_end"] == 0.01
    assert config["prediction_type"] == "v_prediction"
    assert "use_karras_sigmas" not in config
    # Where the teacher is silent its own scheduler's defaults hold, not LCMScheduler's.
    silent = lcm_scheduler({"_class_name": "DDIMScheduler"})
    assert (silent["beta_schedule"], silent["beta_end"]) == ("linear", 0.02)


def test_pickles_and_paths_are_left_behind(teacher, copy, tmp_path):
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["_name_or_path"] = "/home/someone/model"
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "config.json").write_text("{}")
    (copy / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    folder = write_pipeline(load_model(copy, on_device=False), tmp_path / "student")
    written = json.loads((folder / "model_index.json").read_text())
    assert written["safety_checker"] == [None, None]
    assert written["requires_safety_checker"] is False
    assert "_name_or_path" not in written
    assert not (folder / "safety_checker").exists()


def test_lost_source_leaves_nothing(copy, tmp_path):
    pipeline = load_model(copy, on_device=False)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer is missing"):
        write_pipeline(pipeline, tmp_path / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("model_index.json", "model_index.json is missing; the model folder is not whole"),
        ("vae/config.json", "config.json is missing; the model folder is not whole"),
        ("tokenizer_2/vocab.json", "tokenizer_2 holds no vocab.json"),
        ("unet/diffusion_pytorch_model.safetensors", "holds no diffusion_pytorch_model"),
    ],
)
def test_half_a_folder(copy, part, message):
    (copy / part).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_model(copy, on_device=False)


def test_bad_json(copy):
    (copy / "unet" / "config.json").write_text('{"act_fn": ')
    with pytest.raises(ValueError, match="unet/config.json is not valid JSON"):
        load_model(copy, on_device=False)


def test_components_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        open_component(tmp_path, "model")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        open_component(tmp_path, "model")
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", '{"weight_map": {"a": "../secret.safetensors"}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match="is not a safetensors index"):
            open_component(tmp_path, "model")
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="model-1.safetensors is not a readable"):
        open_component(tmp_path, "model")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="model.safetensors is not a readable"):
        open_component(tmp_path, "model")
