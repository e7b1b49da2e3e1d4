"""Baselines: a LoRA onto the teacher or a whole pipeline, sampled by its own sampler."""

import json

import jax
import numpy as np
import pytest

from tests.evaluation.test_evaluate import run_command
from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax.diffusion import samplers
from tlcm_jax.evaluation import evaluate as evaluation
from tlcm_jax.evaluation.baselines import BASELINES, BaselineFile, contestants
from tlcm_jax.evaluation.evaluate import evaluate
from tlcm_jax.evaluation.results import PromptSet
from tlcm_jax.families.load import load_model
from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_by, generate_teacher
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.models import lora

PROMPTS = ("a red cat", "an icon", "red")
OPTIONS = GenerationOptions(batch_size=25)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pipeline, another, and a LoRA of the first."""
    folder = tmp_path_factory.mktemp("files")
    write_tiny_pipeline(folder / "base")
    write_tiny_pipeline(folder / "other", seed=1)
    base = load_model(folder / "base")
    fresh = lora.init(base.params["unet"], ("to_q", "conv1"), 2, jax.random.key(0))
    adapter = random_adapter(fresh, np.random.default_rng(0), 0.3)
    write_lora(folder / "lora.safetensors", adapter, LORA_NAMES)
    return folder, base, adapter


def test_each_is_sampled_as_its_authors_say(files):
    folder, base, adapter = files
    named = [
        f"lightning:2={folder / 'lora.safetensors'}",
        f"lcm={folder / 'lora.safetensors'}",
        f"turbo={folder / 'other'}",
    ]
    parsed = [BaselineFile.parse(text) for text in named]
    result = evaluate(
        base,
        [PromptSet(name="few", prompts=PROMPTS)],
        steps=[1, 2],
        baselines=list(contestants(parsed, base, [1, 2])),
    )
    by_label = {one.by.label: one.images for one in result.sets[0].generated}
    assert list(by_label)[2:] == [
        "lightning, 2 steps", "lcm, 1 step", "lcm, 2 steps", "turbo, 1 step", "turbo, 2 steps",
    ]  # fmt: skip
    other = load_model(folder / "other")
    for label, sampler, model, own in (
        ("lightning, 2 steps", samplers.euler(base.process, 2), base, adapter),
        ("lcm, 2 steps", samplers.lcm(base.process, 2), base, adapter),
        ("turbo, 2 steps", samplers.euler_ancestral(base.process, 2), other, None),
    ):
        expected = generate_by(sampler, model, PROMPTS, 0, own, options=OPTIONS)
        np.testing.assert_array_equal(by_label[label], expected)
    entries = result.metrics()["sets"]["few"]
    assert entries["lcm"].keys() == {"1", "2"} and entries["lightning"].keys() == {"2"}


def test_a_unet_s_weights_alone_go_onto_the_teacher(files):
    folder, base, _ = files
    weights = folder / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    file = BaselineFile.parse(f"dmd2={weights}")
    (one,) = contestants([file], base, [4])
    found = one.draw(PROMPTS, 0, OPTIONS)
    other = load_model(folder / "other")
    whole = base.with_params(unet=other.params["unet"])
    expected = generate_by(BASELINES["dmd2"].sampler(base.process, 4), whole, PROMPTS, 0)
    assert np.max(np.abs(found.astype(int) - expected.astype(int))) <= 1
    assert np.any(
        found != generate_by(BASELINES["dmd2"].sampler(base.process, 4), base, PROMPTS, 0)
    )
    with pytest.raises(ValueError, match="is an autoencoder"):
        vae = folder / "other" / "vae" / "diffusion_pytorch_model.safetensors"
        next(contestants([BaselineFile.parse(f"dmd2={vae}")], base, [4])).draw(PROMPTS, 0, OPTIONS)


def test_guidance_is_the_teacher_s(files):
    """DDIM's plan with guidance is the teacher's sampler, where its steps divide the schedule."""
    _, base, _ = files
    plan = samplers.ddim(base.process, 4)
    ours = generate_by(plan, base, PROMPTS, 3, guidance_scale=2.5)
    theirs = generate_teacher(base, PROMPTS, 4, 2.5, 3)
    assert np.max(np.abs(ours.astype(int) - theirs.astype(int))) <= 1
    assert np.any(ours != generate_by(plan, base, PROMPTS, 3))


def test_a_part_of_the_prompts_has_the_noise_of_its_place(files):
    _, base, _ = files
    whole = generate(base, PROMPTS, 2, 3)
    part = generate(base, PROMPTS[1:], 2, 3, options=GenerationOptions(first=1))
    assert np.max(np.abs(whole[1:].astype(int) - part.astype(int))) <= 1


def test_the_table_s_plans_can_be_made(files):
    _, base, _ = files
    for known in BASELINES.values():
        for steps in known.steps:
            assert known.sampler(base.process, steps).steps == steps


def test_the_command_puts_them_beside_the_student(files, tmp_path, monkeypatch):
    folder, _, _ = files
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", (2,))
    (tmp_path / "few.txt").write_text("a red cat\nan icon\n")
    given = (f"--model={folder / 'base'}", f"--prompts={tmp_path / 'few.txt'}", "--steps=4")
    run_command(*given, f"--baseline=dmd2={folder / 'lora.safetensors'}",
                f"--output={tmp_path / 'out'}")  # fmt: skip
    found = json.loads((tmp_path / "out/metrics.json").read_text())["sets"]["few"]
    assert found["dmd2"].keys() == {"4"} and found["student"].keys() == {"4"}
    assert "dmd2, 4 steps" in (tmp_path / "out/report.html").read_text()
