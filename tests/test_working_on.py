"""Working on with a distilled model: a user's LoRA before it, style after it, guidance kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax import sample
from tlcm_jax.config import describe, inputs
from tlcm_jax.config.run import train
from tlcm_jax.config.schema import read
from tlcm_jax.config.workdir import load_adapter
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import GenerationOptions, generate
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import concat_loras


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "teacher")
    (folder / "prompts.txt").write_text("a red cat\na cat icon\nan icon of a cat\n")
    return folder


@pytest.fixture(scope="module")
def teacher(world):
    return load_model(world / "teacher")


@pytest.fixture(scope="module")
def users(world, teacher):
    """Two LoRAs of a user's, as files."""
    found = []
    for seed in (1, 2):
        fresh = lora.init(teacher.params["unet"], ("to_q", "to_v"), 2, jax.random.key(0))
        adapter = random_adapter(fresh, np.random.default_rng(seed), 0.3)
        path = world / f"mine{seed}.safetensors"
        write_lora(path, adapter, teacher.lora_names, dtype="fp32", metadata={})
        found.append((path, adapter))
    return found


@pytest.fixture(scope="module")
def config(world, users):
    return dict(
        name="tiny",
        model=dict(path=str(world / "teacher"), loras=[f"{users[0][0]}:0.5"]),
        prompts=[str(world / "prompts.txt")],
        adapter=dict(rank=2, alpha=2.0, merged=True),
        stages=dict(
            guided=dict(
                objective="mlcd", steps=1, batch_size=24, prompts_per_refill=8,
                learning_rate=1e-1, unconditional=0.5,
                settings=dict(segments=2, points_per_segment=1, guidance_scale=1.0),
            ),
        ),
        evaluation=dict(prompts=[], student_guidance_scales=[3.0, 1.0]),
        export=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def workdir(world, config):
    train(config, world / "run", progress=False)
    return world / "run"


def run(model, folder, *words):
    values = flags.FlagValues()
    sample.define_flags(values)
    output = folder / "out.png"
    words = ("sample", "--model", str(model), "--prompt", "a cat", "--output", str(output), *words)
    values([*words, "--steps=1", "--seed=3"])
    sample.run(values)
    return np.asarray(Image.open(output)).astype(int)


def test_a_student_of_a_user_s_lora_is_drawn_with_it_and_styled(teacher, users, workdir, tmp_path):
    (first, mine), (second, style) = users
    trained = load_adapter(workdir)[1]
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(trained))

    def expected(*adapters, **options):
        both = concat_loras([tree for tree, _ in adapters], [weight for _, weight in adapters])
        return generate(teacher, ["a cat"], 1, 3, both, **options)[0].astype(int)

    plain = run(workdir, tmp_path, "--guidance_scale=1")
    assert np.max(np.abs(plain - expected((mine, 0.5), (trained, 1)))) <= 1
    assert np.mean(plain != expected((trained, 1))) > 0.3
    styled = run(
        workdir, tmp_path, "--guidance_scale=1", f"--style={second}:0.7", "--student_weight=0.5"
    )
    assert np.max(np.abs(styled - expected((mine, 0.5), (trained, 0.5), (style, 0.7)))) <= 1
    # A run's own scale, and another negative prompt than none.
    guided, options = run(workdir, tmp_path), GenerationOptions(negative_prompt="an icon")
    assert np.max(np.abs(guided - expected((mine, 0.5), (trained, 1), guidance_scale=3.0))) <= 1
    assert np.mean(guided != plain) > 0.3
    negative = run(workdir, tmp_path, "--negative_prompt", "an icon")
    wanted = expected((mine, 0.5), (trained, 1), guidance_scale=3.0, options=options)
    assert np.max(np.abs(negative - wanted)) <= 1
    assert np.mean(negative != guided) > 0.3


def test_a_negative_prompt_stands_in_the_place_of_none(teacher):
    """Equation (1) of diffusion.guidance, by hand."""
    noise = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
    z = jax.random.normal(noise, (1, 8, 8, 4))
    t = jnp.full(1, 999)
    given, away = (
        teacher.denoiser()(z, t, teacher.encode([text])) for text in ("a cat", "an icon")
    )
    images = teacher.decode(away + 2.0 * (given - away))
    options = GenerationOptions(negative_prompt="an icon")
    drawn = generate(teacher, ["a cat"], 1, 3, options=options, guidance_scale=2.0)
    assert np.max(np.abs(drawn - np.round(255 * np.asarray(images)))) <= 1


def test_a_run_remembers_its_loras_by_content(config, users, workdir, tmp_path):
    settings = read(config)
    found = inputs.Inputs(workdir, settings, ["a red cat", "a cat icon", "an icon of a cat"])
    found.check()
    assert "model.loras" in found.moved
    (tmp_path / "mine1.safetensors").write_bytes(users[1][0].read_bytes())
    moved = {**config["model"], "loras": [f"{tmp_path}/mine1.safetensors:0.5"]}
    other = inputs.Inputs(workdir, read({**config, "model": moved}), [])
    assert "model.loras" not in other.moved


def test_the_card_says_what_is_in_and_what_goes_beside(config, teacher):
    recipe = describe.student_recipe(read(config), teacher)
    assert recipe.loras == ("mine1.safetensors, weight 0.5",)
    card = teacher.card(recipe, "kohya")
    assert "load them too" in card and "`mine1.safetensors, weight 0.5`" in card
    assert "load them too" not in teacher.card(recipe, "pipeline")
    assert "with these LoRAs merged in" in teacher.card(recipe, "pipeline")
    assert "Guidance is yours" in card and "guidance_scale=3," in card and "CFG 3" in card
    stage = {**config["stages"]["guided"], "settings": {"guidance_scale": 8.0}}
    baked = describe.student_recipe(read({**config, "stages": {"guided": stage}}), teacher)
    assert "Guidance is off" in teacher.card(baked, "kohya")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student_weight=0.5"], "--student_weight is of a run's adapter"),
        (["--negative_prompt", "ice"], "no effect without guidance"),
        (["--guidance_scale=-1"], "must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(world, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        run(world / "teacher", tmp_path, *words)


def test_guidance_that_is_distilled_in_is_not_given_again(config, workdir, tmp_path, monkeypatch):
    stage = {**config["stages"]["guided"], "settings": {"guidance_scale": 8.0}}
    baked = {**config, "stages": {"guided": stage}}
    monkeypatch.setattr("tlcm_jax.config.workdir._config", lambda path: baked)
    for words in (["--guidance_scale=3"], ["--negative_prompt", "ice"]):
        with pytest.raises(ValueError, match="variant :guided"):
            run(workdir, tmp_path, *words)


def test_settings_out_of_range_are_refused(config):
    def changed(**more):
        return read({**config, "stages": {"guided": {**config["stages"]["guided"], **more}}})

    with pytest.raises(ValueError, match="unconditional = 1.0: must lie in 0"):
        changed(unconditional=1.0)
    reward = {"preference": {"scorers": {"mps": {"weights": "none"}}}}
    with pytest.raises(ValueError, match="preference would score pairs by prompts"):
        changed(terms=reward)
    with pytest.raises(ValueError, match="student_guidance_scales"):
        read({**config, "evaluation": {"prompts": [], "student_guidance_scales": []}})
