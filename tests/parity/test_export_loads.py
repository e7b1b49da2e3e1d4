"""Every export, loaded and sampled by diffusers as a user would, draws what this library draws."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open

reason = "loading an export in its consumer needs torch, diffusers and peft"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
pytest.importorskip("peft", reason=reason)

from tests.support.controls import TINY_ADAPTER, tiny_controlnet, write_control  # noqa: E402
from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline  # noqa: E402
from tlcm_jax.diffusion.scheduler_config import lcm_scheduler  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.io import verify  # noqa: E402
from tlcm_jax.io.json_files import write_json  # noqa: E402
from tlcm_jax.io.model_card import Recipe  # noqa: E402
from tlcm_jax.io.products import export_products  # noqa: E402
from tlcm_jax.io.verify import (  # noqa: E402
    VerificationError,
    draw_consumer,
    verify_products,
)
from tlcm_jax.models import lora  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On nets this small, PyTorch's threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_model(write_tiny_pipeline(tmp_path_factory.mktemp("teacher") / "tiny"))


def student_of(pipeline):
    """An adapter that changes pictures beyond doubt."""
    unet = pipeline.params["unet"]
    shapes = jax.eval_shape(lambda key: lora.init(unet, lora.TARGETS, 4, key), jax.random.key(0))
    return random_adapter(shapes, np.random.default_rng(5), size=0.2)


def export(pipeline, targets, output, dtype):
    recipe = Recipe(name="tiny", teacher="tiny", method="TLCM", times={4: (999, 749, 499, 124)})
    return export_products(pipeline, student_of(pipeline), targets, output, dtype, recipe)


def test_products_draw_our_latents(teacher, tmp_path):
    wanted = {"fp32": tuple(teacher.products), "fp16": ("lora", "single-file")}
    products = {
        f"{target} {dtype}": path
        for dtype, targets in wanted.items()
        for target, path in export(teacher, targets, tmp_path / dtype, dtype).items()
    }
    results = verify_products(products, teacher.source)
    assert set(results) == set(products)
    for name, differences in results.items():
        assert set(differences) == {2, 4, 8}
        assert max(differences.values()) < 1e-4, (name, differences)


def test_products_draw_our_latents_with_a_controlnet(teacher, tmp_path):
    control = write_control(tmp_path / "canny", tiny_controlnet(teacher.configs["unet"]))
    products = export(teacher, ("kohya",), tmp_path / "export", "fp32")
    found = verify_products(products, teacher.source, steps=(2,), control=control)
    assert set(found) == {"kohya", "kohya with the ControlNet"}
    assert all(differences[2] < 1e-4 for differences in found.values()), found
    adapter = write_control(tmp_path / "sketch", TINY_ADAPTER)
    with pytest.raises(ValueError, match="verified with ControlNets alone"):
        verify_products(products, teacher.source, steps=(2,), control=adapter)
    assert products["kohya"].exists()


def test_products_of_sd15_draw_our_latents(tmp_path):
    """One text tower, convolutions for projections, and a teacher that is itself a single file."""
    folder = write_tiny_pipeline(tmp_path / "sd", family="sd")
    first = export(load_model(folder), ("single-file",), tmp_path / "first", "fp32")
    teacher = load_model(first["single-file"])
    products = export(teacher, ("kohya", "single-file"), tmp_path / "second", "fp32")
    results = verify_products(products, teacher.source, steps=(2,))
    assert max(results["kohya"][2], results["single-file"][2]) < 1e-4


@pytest.mark.parametrize(("family", "size"), [("sdxl", "48x32"), ("sd", "32x64")])
def test_images_that_are_not_square_are_drawn_alike(tmp_path, family, size):
    """SDXL is told the size; SD 1.x sees it."""
    model = load_model(write_tiny_pipeline(tmp_path / "tiny", family=family))
    products = export(model, ("kohya",), tmp_path / "out", "fp32")
    results = verify_products(products, model.source, steps=(2,), resolution=size)
    assert max(max(differences.values()) for differences in results.values()) < 1e-4


@pytest.mark.parametrize("target", ["lora", "kohya"])
def test_lora_has_its_effect_in_diffusers(teacher, tmp_path, target):
    path = export(teacher, (target,), tmp_path, "fp32")[target]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        teacher.source, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(
        pipe.scheduler.config, original_inference_steps=8
    )
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    plain, _ = draw_consumer(pipe, ["a cat"], 2, noise, 0)
    pipe.load_lora_weights(str(path.parent))  # a folder of one file will do as well
    adapted, _ = draw_consumer(pipe, ["a cat"], 2, noise, 0)
    assert np.linalg.norm(adapted - plain) > 0.1 * np.linalg.norm(plain)


def test_products_of_zero_terminal_snr_draw_our_latents(tmp_path):
    """Such a teacher's students sample from pure noise, in the LCMScheduler that is written too."""
    folder = write_tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "rescale_betas_zero_snr": True})
    teacher = load_model(folder)
    assert teacher.process.alphas[-1] == 0
    products = export(teacher, ("kohya", "pipeline", "single-file"), tmp_path / "export", "fp32")
    assert load_model(products["pipeline"]).process == teacher.process
    results = verify_products(products, teacher.source, steps=(2,))
    assert max(differences[2] for differences in results.values()) < 1e-4
    # Other programs know by markers what the file predicts.
    with safe_open(products["single-file"], framework="numpy") as file:
        assert {"v_pred", "ztsnr"} < set(file.keys())
        assert file.get_tensor("v_pred").shape == (0,)
        header = file.metadata()
    assert header["modelspec.prediction_type"] == "v"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    with safe_open(products["kohya"], framework="numpy") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sdxl_base_v1-0" and header["ss_network_dim"] == "4"
    workflow = json.loads((products["single-file"].parent / "comfyui_workflow.json").read_text())
    (marked,) = (n for n in workflow.values() if n["class_type"] == "ModelSamplingDiscrete")
    assert marked["inputs"]["zsnr"] is True


def test_products_of_a_teacher_that_predicts_x0_draw_our_latents(tmp_path):
    teacher = load_model(write_tiny_pipeline(tmp_path / "x0", prediction_type="sample"))
    products = export(teacher, ("lora", "pipeline"), tmp_path / "export", "fp32")
    results = verify_products(products, teacher.source, steps=(2,))
    assert max(results["lora"][2], results["pipeline"][2]) < 1e-4


@pytest.mark.parametrize(("size", "passes"), [(2.0, False), (0.5, True)])
def test_twice_the_tolerance_fails_and_half_of_it_passes(
    teacher, tmp_path, monkeypatch, size, passes
):
    product = export(teacher, ("unet",), tmp_path, "fp32")

    def changed(*arguments):
        latents, fresh = draw_consumer(*arguments)
        change = np.random.default_rng(0).standard_normal(latents.shape, np.float32)
        norms = np.linalg.norm(latents) / np.linalg.norm(change)
        return latents + np.float32(size * verify.TOLERANCE * norms) * change, fresh

    monkeypatch.setattr(verify, "draw_consumer", changed)
    if passes:
        results = verify_products(product, teacher.source, steps=(2,))
        assert results["unet"][2] == pytest.approx(size * verify.TOLERANCE, rel=0.1)
    else:
        message = "unet .* failed and was deleted: its latents differ from ours by 0.0002, relative"
        with pytest.raises(VerificationError, match=message):
            verify_products(product, teacher.source, steps=(2,))
    assert product["unet"].exists() == passes


def test_product_that_fails_is_deleted_and_named(tmp_path):
    teacher = load_model(
        write_tiny_pipeline(tmp_path / "tiny", prediction_type="v_prediction", seed=1)
    )
    good = export(teacher, ("pipeline",), tmp_path / "export", "bf16")["pipeline"]
    # A scheduler that mixes the noisy latents into its answer: worse pictures, without an error.
    bad = shutil.copytree(good, tmp_path / "bad")
    config = lcm_scheduler(teacher.configs["scheduler"])
    write_json(bad / "scheduler" / "scheduler_config.json", {**config, "timestep_scaling": 0.001})
    with pytest.raises(VerificationError, match="^bad .* failed and was deleted: its latents"):
        verify_products({"bad": bad, "good": good}, teacher.source, steps=(2,))
    assert good.exists() and not bad.exists()
