"""A second family goes through every command by the table alone, and is nowhere named but there."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support import toy_family
from tests.support.toy_family import LATENT, LORA, write_toy
from tlcm_jax import evaluate, export, main, sample
from tlcm_jax.config.workdir import load_adapter
from tlcm_jax.diffusion import sampling
from tlcm_jax.families import load
from tlcm_jax.families.load import find_family, load_model
from tlcm_jax.generation import generate as generation
from tlcm_jax.generation.generate import generate, generate_teacher
from tlcm_jax.io.lora_files import read_lora
from tlcm_jax.models import lora

PROMPTS = ["a red cat", "an icon", "ice"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "FAMILIES", dict(load.FAMILIES))
        toy_family.register()
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "teacher")


@pytest.fixture(scope="module")
def model(folder, registered):
    return load_model(folder)


def run(command, *arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["command", *map(str, arguments)])
    command.run(values)


def noise(seed, count):
    keys = [jax.random.fold_in(jax.random.key(seed), row) for row in range(count)]
    return jnp.stack([jax.random.normal(jax.random.fold_in(key, 0), (LATENT,)) for key in keys])


def images(model, latents):
    return np.round(255 * np.asarray(model.decode_latents(model.params, latents)))


def test_without_its_line_the_family_is_refused_by_name(folder, monkeypatch):
    monkeypatch.delitem(load.FAMILIES, toy_family.KIND)
    with pytest.raises(ValueError, match="pipeline class 'ToyFlowPipeline' is not one of"):
        load_model(folder)


@pytest.fixture
def decoded(monkeypatch):
    """The latents that images are decoded from: images themselves hide small differences."""
    latents, decode = [], generation._decode
    monkeypatch.setattr(
        generation, "_decode", lambda *args: latents.append(args[-1]) or decode(*args)
    )
    return latents


def test_generation_is_the_samplers_own(model, decoded):
    ids = model.tokenize(PROMPTS)
    conditioning = model.encode_tokens(model.params, ids)
    denoiser, null = model.denoiser(), model.null_conditioning()
    one = sampling.sample(denoiser, model.process, noise(3, 3), conditioning, (999,))
    found = generate(model, PROMPTS, 1, seed=3)
    assert found.shape == (3, 8, 8, 3) and found.dtype == np.uint8 and found.std() > 5
    assert np.max(np.abs(found - images(model, one))) <= 1
    np.testing.assert_allclose(decoded.pop(), one, atol=1e-5)
    taught = sampling.sample_teacher(
        denoiser, model.process, noise(3, 3), conditioning, lambda c: model.null_of(null, c), 6, 3.0
    )
    found = generate_teacher(model, PROMPTS, 6, 3.0, seed=3)
    assert np.max(np.abs(found - images(model, taught))) <= 1
    np.testing.assert_allclose(decoded.pop(), taught, atol=1e-5)


def test_a_value_of_the_first_family_is_refused_or_not_used(model):
    with pytest.raises(ValueError, match="resolution 16: this model makes 8"):
        generate(model, PROMPTS, 1, 0, options=sample.GenerationOptions(resolution=16))
    with pytest.raises(ValueError, match="one text encoder"):
        generate(model, PROMPTS, 1, 0, options=sample.GenerationOptions(prompts_2=PROMPTS))
    with pytest.raises(ValueError, match="does not take the scale as an input"):
        model.with_embedded_guidance(3.0)


@pytest.fixture(scope="module")
def workdir(folder, registered, tmp_path_factory):
    """Both stages of the method on a flow, with an evaluation and all exports at the end."""
    place = tmp_path_factory.mktemp("run")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    adapter = dict(rank=2, alpha=4.0, targets=["fc1", "fc2"], merged=True)
    stage = dict(steps=3, batch_size=8, learning_rate=3e-2)
    config = dict(
        name="toy",
        model=dict(path=str(folder)),
        prompts=[str(place / "prompts.txt")],
        adapter=adapter,
        stages=dict(
            mlcd=dict(
                stage,
                objective="mlcd",
                settings=dict(segments=4, points_per_segment=1, guidance_scale=2.0),
            ),
            lcd=dict(
                stage,
                objective="lcd",
                settings=dict(segments=4, teacher_substeps=1, guidance_scale=2.0),
            ),
        ),
        evaluation=dict(
            prompts=[str(place / "prompts.txt")], steps=[1, 4], guidance_scale=2.0, pictures=2
        ),
        export=["lora", "pipeline"],
        log_every=1,
    )
    main.run(config, place / "run", progress=False)
    return place / "run"


def test_main_trains_reports_and_exports(workdir, model):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["mlcd"] * 3 + ["lcd"] * 3
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert set(metrics["sets"]["prompts"]["student"]) == {"1", "4"}
    assert "a red cat" in (workdir / "report.html").read_text()
    _, trained = load_adapter(workdir)
    exported = read_lora(
        workdir / "export" / "lora" / "toy_lora.safetensors", model.params["velocity"], LORA
    )
    for path, leaf in flax.traverse_util.flatten_dict(exported).items():
        ours = flax.traverse_util.flatten_dict(trained)[path]
        np.testing.assert_allclose(leaf, ours, rtol=2e-3, atol=1e-6)  # fp16
        assert np.any(leaf)


def test_export_writes_a_model_that_is_the_student(workdir, model, tmp_path):
    run(
        export, "--workdir", workdir, "--to", "pipeline,lora", "--output", tmp_path,
        "--dtype", "fp32",
    )  # fmt: skip
    student = load_model(tmp_path / "pipeline")
    _, trained = load_adapter(workdir)
    merged = lora.merge(model.params["velocity"], trained)
    jax.tree.map(np.testing.assert_array_equal, student.params["velocity"], merged)
    np.testing.assert_array_equal(
        generate(student, PROMPTS, 4, 0), generate(model, PROMPTS, 4, 0, trained)
    )
    assert find_family(tmp_path / "pipeline")[0] is type(student)
    for product, message in (("kohya", "choose from lora, pipeline"), ("pipeline", "--verify")):
        with pytest.raises(ValueError, match=message):
            run(export, "--workdir", workdir, "--to", product, "--output", tmp_path, "--verify")


def test_sample_draws_with_the_run_s_adapter(workdir, model, tmp_path):
    run(
        sample, "--model", workdir, "--prompt", PROMPTS[0], "--steps", 4,
        "--output", tmp_path / "out.png",
    )  # fmt: skip
    _, trained = load_adapter(workdir)
    expected = generate(model, PROMPTS[:1], 4, 0, trained)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)
    assert np.any(expected != generate(model, PROMPTS[:1], 4, 0)[0])


def test_evaluate_compares_with_the_teacher(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run(
        evaluate, "--model", workdir, "--prompts", tmp_path / "prompts.txt", "--steps", "1,2",
        "--output", tmp_path / "out",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["sets"]["prompts"]["teacher"]) == {"25", "4"}
    assert (tmp_path / "out" / "samples" / "prompts.png").is_file()
