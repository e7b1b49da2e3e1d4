"""Pipeline folders: written and read back bit for bit, and half ones refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tlcm_jax.diffusion.scheduler_config import lcm_scheduler
from tlcm_jax.families.load import find_family, load_model
from tlcm_jax.io.files import DTYPES
from tlcm_jax.io.model_card import Recipe
from tlcm_jax.io.products import check_products, export_products
from tlcm_jax.io.tensors import open_component

RECIPE = Recipe(name="tiny", teacher="tiny", method="TLCM", times={4: (999, 749, 499, 124)})


def export(model, output):
    """The folder of a student whose every weight is its teacher's and a thousandth."""
    unet = jax.tree.map(lambda x: x + np.float32(1e-3), model.params["unet"])
    return export_products(model, unet, ["pipeline"], output, "fp32", RECIPE)["pipeline"], unet


def edit_index(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_round_trip_keeps_every_bit(teacher, tmp_path):
    folder, unet = export(teacher, tmp_path)
    student = load_model(folder, on_device=False)
    jax.tree.map(np.testing.assert_array_equal, student.params, {**teacher.params, "unet": unet})
    assert student.process == teacher.process
    prompts = ["a red cat", ""]
    for ours, theirs in zip(student.tokenize(prompts), teacher.tokenize(prompts), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (folder / "README.md").read_text() == teacher.card(RECIPE, "pipeline")
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "LCMScheduler",
    ]


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLImg2ImgPipeline", "LatentConsistencyModelPipeline"]
)
def test_pipelines_of_the_same_networks_load_and_are_written_as_text_to_image(
    teacher, copy, tmp_path, kind
):
    edit_index(copy, _class_name=kind)
    model = load_model(copy, on_device=False)
    assert len(model.text_encoders) == 1 + ("XL" in kind)
    written = json.loads((export(model, tmp_path / "out")[0] / "model_index.json").read_text())
    assert written["_class_name"] == f"StableDiffusion{'XL' * ('XL' in kind)}Pipeline"


def test_another_pipeline_is_refused_by_name(copy):
    edit_index(copy, _class_name="os:system")
    with pytest.raises(ValueError, match="pipeline class 'os:system' is not one of Latent"):
        load_model(copy, on_device=False)


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
    silent = lcm_scheduler({"_class_name": "TCDScheduler"})
    assert (silent["beta_schedule"], silent["beta_end"]) == ("scaled_linear", 0.012)
    assert lcm_scheduler({"rescale_betas_zero_snr": True})["rescale_betas_zero_snr"] is True


def test_pickles_and_paths_are_left_behind(copy, tmp_path):
    edit_index(
        copy,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        _name_or_path="/home/someone/model",
    )
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "config.json").write_text("{}")
    (copy / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    folder, _ = export(load_model(copy, on_device=False), tmp_path / "out")
    written = json.loads((folder / "model_index.json").read_text())
    assert written["safety_checker"] == [None, None]
    assert written["requires_safety_checker"] is False
    assert "_name_or_path" not in written
    assert not (folder / "safety_checker").exists()


def test_lost_source_leaves_nothing(copy, tmp_path):
    model = load_model(copy, on_device=False)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer is missing"):
        export(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_what_an_export_lacks_is_found_before_the_training(copy):
    edit_index(copy, watermarker=["x", "Y"])
    family, folder = find_family(copy)
    check_products(family.products, folder, ["lora", "unet"])
    for product in ("pipeline", "single-file"):
        with pytest.raises(FileNotFoundError, match="watermarker is missing or pickled"):
            check_products(family.products, folder, [product])


@pytest.mark.parametrize("name", ["../../.docker", "/etc", "a/b", "..", ""])
def test_names_of_components_are_plain_folders(copy, name):
    """They are joined to paths that an export reads and writes."""
    edit_index(copy, **{name: ["x", "Y"]})
    with pytest.raises(ValueError, match=f"component {name!r} is not a plain folder name"):
        load_model(copy, on_device=False)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"act_fn": ', "is not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("[" * 100_000, "is not valid JSON: nested too deeply"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("file", ["unet/config.json", "model_index.json"])
def test_bad_json(copy, file, content, message):
    (copy / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{file} {message}"):
        load_model(copy, on_device=False)


def edit_json(path, **entries):
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("unet", {"layers_per_block": 10**9}, "layers_per_block = 1000000000: must be at most 200"),
        (
            "unet",
            {"transformer_layers_per_block": [1, 10**5]},
            "transformer_layers_per_block = 1000",
        ),
        ("unet", {"block_out_channels": "wide"}, ""),
        ("unet", {"block_out_channels": 5}, "a value is not of the type it must have"),
        ("unet", {"block_out_channels": [-32, 64]}, ""),
        ("unet", {"cross_attention_dim": None}, ""),
        ("unet", {"norm_num_groups": 7}, ""),
        ("vae", {"layers_per_block": 10**5}, "layers_per_block = 100000: must be at most 200"),
        ("vae", {"latent_channels": {"a": 1}}, ""),
        ("vae", {"scaling_factor": float("nan")}, "is not valid JSON: NaN is no number"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: must be at"),
        ("text_encoder", {"hidden_size": "8"}, ""),
    ],
)
def test_configs_that_no_network_has_are_one_line_that_names_the_file(copy, file, entries, message):
    edit_json(copy / file / "config.json", **entries)
    with pytest.raises(ValueError, match=rf"{file}/config.json.*{message}") as error:
        load_model(copy, on_device=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_train_timesteps": 10**9}, "num_train_timesteps = 1000000000: must be at most"),
        ({"num_train_timesteps": "many"}, "invalid literal"),
        ({"trained_betas": {"a": 1}}, "a value is not of the type"),
        ({"beta_end": [1]}, "a value is not of the type"),
    ],
)
def test_schedules_that_there_are_none_of(copy, entries, message):
    edit_json(copy / "scheduler" / "scheduler_config.json", **entries)
    with pytest.raises(ValueError, match=f"scheduler_config.json: {message}"):
        load_model(copy, on_device=False)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "fp32"), (-np.inf, "fp32"), (np.nan, "bf16"), (np.inf, "fp16")]
)
def test_weights_that_are_not_finite_are_refused_by_name(copy, value, dtype, on_device):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "mid_block.resnets.0.conv1.weight"
    tensors[name][-1, 0, 1, 2] = value
    save_file({key: x.astype(DTYPES[dtype]) for key, x in tensors.items()}, path)
    with pytest.raises(ValueError, match=f"unet: {name} holds values that are not finite"):
        load_model(copy, on_device=on_device)
    tensors[name][-1, 0, 1, 2] = 6e4  # large, but finite in each
    save_file({key: x.astype(DTYPES[dtype]) for key, x in tensors.items()}, path)
    load_model(copy, on_device=on_device)


def test_a_tokenizer_of_another_vocabulary_is_refused(copy):
    path = copy / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({token: i + 1000 for token, i in vocabulary.items()}))
    with pytest.raises(ValueError, match="tokenizer does not go with its text encoder: token ids"):
        load_model(copy, on_device=False)
    for content in ("[]", "{", '{"a": "b"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="tokenizer.*(holds no CLIP|must hold|not valid JSON)"):
            load_model(copy, on_device=False)


def test_a_mark_that_the_vocabulary_lacks_is_refused(copy):
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        edit_json(copy / "tokenizer" / name, eos_token="zzz")
    with pytest.raises(ValueError, match="tokenizer does not go with its text encoder"):
        load_model(copy, on_device=False)


def test_a_link_out_of_the_model_is_not_copied(copy, tmp_path):
    model = load_model(copy, on_device=False)
    secret = tmp_path / "secret.json"
    secret.write_text('{"key": 1}')
    (copy / "tokenizer" / "token.json").symlink_to(secret)
    with pytest.raises(ValueError, match="token.json is a link to outside the model's folder"):
        export(model, tmp_path / "out")
    (copy / "tokenizer" / "token.json").unlink()
    # The hub's cache is made of links into its own blobs.
    cache = tmp_path / "models--a--b"
    shutil.copytree(copy, cache / "snapshots" / "0a1b")
    (cache / "blobs").mkdir()
    vocabulary = cache / "snapshots" / "0a1b" / "tokenizer" / "vocab.json"
    vocabulary.rename(cache / "blobs" / "1234")
    vocabulary.symlink_to("../../../blobs/1234")
    folder, _ = export(load_model(cache / "snapshots" / "0a1b"), tmp_path / "second")
    assert (folder / "tokenizer" / "vocab.json").is_file()
    assert not (folder / "tokenizer" / "vocab.json").is_symlink()


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
