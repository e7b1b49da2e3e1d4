"""Every export, loaded and sampled by diffusers as a user would, draws what this library draws."""

import jax
import numpy as np
import pytest

reason = "loading an export in its consumer needs torch, diffusers and peft"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
pytest.importorskip("peft", reason=reason)

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline  # noqa: E402
from tlcm_jax.interchange.diffusers_folder import load_pipeline  # noqa: E402
from tlcm_jax.interchange.model_card import Recipe  # noqa: E402
from tlcm_jax.interchange.pipeline_folder import write_json  # noqa: E402
from tlcm_jax.interchange.products import export_products  # noqa: E402
from tlcm_jax.interchange.verify import (  # noqa: E402
    VerificationError,
    draw_consumer,
    verify_products,
)
from tlcm_jax.models import lora  # noqa: E402


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_pipeline(write_tiny_pipeline(tmp_path_factory.mktemp("teacher") / "tiny"))


def student_of(pipeline):
    """An adapter that changes pictures beyond doubt."""
    unet = pipeline.params["unet"]
    shapes = jax.eval_shape(lambda key: lora.init(unet, lora.TARGETS, 4, key), jax.random.key(0))
    return random_adapter(shapes, np.random.default_rng(5), size=0.2)


def export(pipeline, targets, output, dtype):
    recipe = Recipe(name="tiny", teacher="tiny")
    return export_products(pipeline, student_of(pipeline), targets, output, dtype, recipe)


def test_products_draw_our_latents(teacher, tmp_path):
    products = {
        f"{target} {dtype}": path
        for dtype in ("fp32", "fp16", "bf16")
        for target, path in export(
            teacher, ("lora", "kohya", "pipeline"), tmp_path / dtype, dtype
        ).items()
    }
    results = verify_products(products, teacher.source)
    assert set(results) == set(products)
    for name, differences in results.items():
        assert set(differences) == {2, 4, 8}
        assert max(differences.values()) < 1e-4, (name, differences)


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


def test_velocity_teacher_and_a_pipeline_that_fails(tmp_path):
    folder = write_tiny_pipeline(tmp_path / "tiny", prediction_type="v_prediction", seed=1)
    teacher = load_pipeline(folder)
    products = export(teacher, ("lora", "pipeline"), tmp_path / "export", "fp16")
    results = verify_products(products, folder, steps=(2,))
    assert max(results["lora"][2], results["pipeline"][2]) < 1e-4
    # A scheduler that mixes the noisy latents into its answer: worse pictures, without an error.
    scheduler = products["pipeline"] / "scheduler" / "scheduler_config.json"
    config = {**teacher.configs["scheduler"], "timestep_scaling": 0.001}
    write_json(scheduler, {**config, "_class_name": "LCMScheduler"})
    with pytest.raises(VerificationError, match="pipeline .* failed and was deleted: its latents"):
        verify_products(products, folder, steps=(2,))
    assert not products["pipeline"].exists() and products["lora"].exists()
