"""Model folders as people have them: configs with nulls and gaps, parts alone, a word on each."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.tiny_pipeline import TOWER, UNET, VAE, write_tiny_pipeline
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.families.product import Student
from tlcm_jax.io.model_card import Recipe
from tlcm_jax.models.clip_text import CLIPTextConfig
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.vae import VAEConfig

TEXT = {**TOWER, "hidden_size": 8, "architectures": ["CLIPTextModel"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def edit(path, drop=(), **entries):
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: v for key, v in {**content, **entries}.items() if key not in drop})
    )


@pytest.mark.parametrize(
    ("kind", "raw", "keys"),
    [
        (UNetConfig, UNET, ("dropout", "act_fn", "class_embed_type", "dual_cross_attention",
                            "time_embedding_type", "attention_type", "norm_eps", "freq_shift")),
        (VAEConfig, VAE, ("act_fn", "scaling_factor", "shift_factor")),
        (CLIPTextConfig, TEXT, ("eos_token_id", "layer_norm_eps", "max_position_embeddings",
                                "vocab_size", "projection_dim")),
    ],
)  # fmt: skip
def test_absent_and_null_are_the_class_s_default(kind, raw, keys):
    silent = {key: value for key, value in raw.items() if key not in keys}
    nulls = [key for key in keys if key not in ("norm_eps", "freq_shift")]
    assert kind.from_dict({**silent, **dict.fromkeys(nulls)}) == kind.from_dict(silent)


def test_what_diffusers_takes_a_null_for():
    """As falsehood in a switch, as its pipelines' own size."""
    assert not UNetConfig.from_dict({**UNET, "flip_sin_to_cos": None}).flip_sin_to_cos
    assert not VAEConfig.from_dict({**VAE, "use_quant_conv": None}).use_quant_conv
    assert UNetConfig.from_dict({**UNET, "sample_size": None}).sample_size == 128
    sd = {key: value for key, value in UNET.items() if key != "addition_embed_type"}
    assert UNetConfig.from_dict({**sd, "sample_size": None}).sample_size == 64


def test_a_whole_clip_s_config_holds_the_text_s():
    whole = {"model_type": "clip", "text_config": TEXT, "projection_dim": 512}
    assert CLIPTextConfig.from_dict(whole) == CLIPTextConfig.from_dict(TEXT)


@pytest.mark.parametrize("architectures", [None, [], ["CLIPTextModel"], ["CLIPModel"], 3])
def test_classes_are_those_of_the_index(whole, folder, architectures):
    """As diffusers' loaders have it: a component's own config is not asked."""
    edit(folder / "text_encoder_2" / "config.json", architectures=architectures)
    edit(folder / "text_encoder_2" / "config.json", drop=("architectures",) * (architectures == []))
    edit(folder / "unet" / "config.json", drop=("_class_name",))
    edit(folder / "vae" / "config.json", _class_name=None)
    edit(folder / "scheduler" / "scheduler_config.json", drop=("_class_name", "beta_schedule"))
    edit(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    model, expected = abstract_model(folder), abstract_model(whole)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected.params)
    assert model.process == expected.process  # LCM's default is the latent curve
    assert model.configs["unet"]["_class_name"] == "UNet2DConditionModel"
    if architectures is None:
        again = load_model(folder, on_device=False)
        np.testing.assert_array_equal(
            again.params["unet"]["conv_in"]["kernel"],
            load_model(whole, on_device=False).params["unet"]["conv_in"]["kernel"],
        )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"unet": ["diffusers", "UNetMotionModel"]},
            "unet is of class UNetMotionModel, which is n",
        ),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae is of class AutoencoderTiny"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is of class T5"),
        ({"_class_name": None}, "pipeline class 'None' is not one of"),
        ({"force_zeros_for_empty_prompt": "no"}, "= 'no': must be true or false"),
    ],
)
def test_other_classes_are_refused_by_name(folder, entry, message):
    edit(folder / "model_index.json", **entry)
    with pytest.raises(ValueError, match=message):
        abstract_model(folder)


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLPAGPipeline", "StableDiffusionXLImg2ImgPipeline"]
)
def test_pipelines_of_the_same_networks(whole, folder, kind):
    edit(folder / "model_index.json", _class_name=kind)
    params = abstract_model(folder).params
    assert jax.tree.structure(params) == jax.tree.structure(abstract_model(whole).params)


def test_parts_alone(folder, tmp_path):
    for part, message in (
        (folder / "unet", r"is one network alone \(UNet2DConditionModel\); give the model's"),
        (folder.parent, "is no pipeline folder, but model in it may be"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_model(part)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is a LoRA's folder, which goes onto a model"):
        load_model(lora)
    files = tmp_path / "files"
    files.mkdir()
    shutil.copyfile(folder / "vae" / "diffusion_pytorch_model.safetensors", files / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="give one of its files: a.safetensors"):
        load_model(files)


def test_a_tokenizer_needs_its_merges(folder):
    (folder / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer_2 holds no merges.txt, without which"):
        load_model(folder, on_device=False)


def test_a_pointer_in_a_folder(folder):
    for part in (
        "vae/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "tokenizer/merges.txt",
    ):
        whole = (folder / part).read_bytes()
        (folder / part).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match=f"{part}.*is a git-lfs pointer.*git lfs pull"):
            load_model(folder, on_device=False)
        (folder / part).write_bytes(whole)


def test_a_student_that_predicts_v_says_so(tmp_path):
    folder = write_tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    model = load_model(folder, on_device=False)
    student = Student(
        model=model, adapter=None, params=model.params["unet"], dtype="fp32", metadata={}
    )
    out = tmp_path / "out"
    out.mkdir()
    model.products["single-file"].write(student, out)
    (file,) = out.glob("*.safetensors")
    assert load_file(file)["v_pred"].size == 0
    assert load_model(file, config=folder, on_device=False).process == model.process
    recipe = Recipe(name="x", teacher="v", method="TLCM", times={2: (999, 499)})
    assert "`v_pred`" in model.card(recipe, "single-file")
    assert "`v_pred`" not in model.card(recipe, "pipeline")
