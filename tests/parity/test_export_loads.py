"""Every export, loaded and sampled by diffusers as a user would, draws what this library draws."""

import shutil

import jax
import numpy as np
import pytest

reason = "loading an export in its consumer needs torch, diffusers and peft"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
pytest.importorskip("peft", reason=reason)

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline  # noqa: E402
from tlcm_jax.diffusion.scheduler_config import lcm_scheduler  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
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


def test_products_of_sd15_draw_our_latents(tmp_path):
    """One text tower, convolutions for projections, and a teacher that is itself a single file."""
    folder = write_tiny_pipeline(tmp_path / "sd", family="sd")
    first = export(load_model(folder), ("single-file",), tmp_path / "first", "fp32")
    teacher = load_model(first["single-file"])
    products = export(teacher, ("kohya", "single-file"), tmp_path / "second", "fp32")
    results = verify_products(products, teacher.source, steps=(2,))
    assert max(results["kohya"][2], results["single-file"][2]) < 1e-4


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
