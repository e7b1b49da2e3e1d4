"""The end of a run on a tiny teacher, at values that are no one's defaults."""

import json
import time

import jax
import numpy as np
import pytest

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax.evaluation import final_eval as module
from tlcm_jax.evaluation.final_eval import FinalEval, curves, final_eval, overlap_note
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.models import lora

TIMES = {2: (999, 700), 3: (999, 600, 300)}
HISTORY = [
    {"stage": "first", "stage_step": 1, "loss": 0.5, "grad_norm": 2.0},
    {"stage": "first", "stage_step": 2, "loss": 0.25, "grad_norm": 1.0,
     "nfe_per_second": 10.0},
    {"stage": "first", "stage_step": 3, "loss": 0.2, "grad_norm": 1.0, "nfe_per_second": 12.0},
    {"stage": "second", "stage_step": 1, "loss": 0.125, "grad_norm": 1.0},
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "first.txt").write_text("a red cat\nan icon\nred\n")
    (folder / "second.txt").write_text("A cat  of ice\nan icon\n")
    return folder


@pytest.fixture(scope="module")
def ended(world):
    """What a run of a random adapter ends with."""
    pipeline = load_model(write_tiny_pipeline(world / "teacher"))
    fresh = lora.init(pipeline.params["unet"], ("to_q", "conv1"), 2, jax.random.key(0))
    adapter = random_adapter(fresh, np.random.default_rng(0), 0.3)
    wanted = FinalEval.load(
        prompts=[str(world / "first.txt"), str(world / "second.txt")],
        scorers=(),
        steps=(3, 2),
        limit=2,
        guidance_scale=3.5,
        gamma=0.0,
        undistilled=(2,),
        student_guidance_scales=(1.0,),
        pictures=1,
        name="student",
        seed=7,
        resolution=48,
        timesteps=TIMES,
        trained_on={"A red  CAT", "a cat of ice"},
    )
    result = final_eval(
        wanted,
        pipeline,
        adapter,
        world / "run",
        history=HISTORY,
        config={"secret": 271828},
        started=time.monotonic() - 3725,
        progress=False,
    )
    return pipeline, adapter, result, world / "run"


def test_images_are_the_recipe_s(ended):
    pipeline, adapter, result, _ = ended
    options = GenerationOptions(resolution=48, batch_size=25)
    prompts = (["a red cat", "an icon"], ["A cat  of ice", "an icon"])
    assert [list(one.prompts.prompts) for one in result.sets] == list(prompts)
    for one, texts in zip(result.sets, prompts, strict=True):
        expected = generate(pipeline, texts, 2, 7, None, 1.0, options)
        (found,) = (each for each in one.generated if each.by.name == "undistilled")
        np.testing.assert_array_equal(found.images, expected[one.shown])
        for steps in (2, 3):
            expected = generate(pipeline, texts, steps, 7, adapter, 0.0, options, TIMES[steps])
            np.testing.assert_array_equal(one.find("student", steps).images, expected[one.shown])
        expected = generate_teacher(pipeline, texts, 4, 3.5, 7, options)
        np.testing.assert_array_equal(one.find("teacher", 4).images, expected[one.shown])
        assert one.find("student", 4) is None
    first = result.sets[0]
    assert first.find("student", 2).images.shape == (1, 48, 48, 3)
    assert np.any(first.find("student", 2).images != first.find("student", 3).images)


def test_what_is_written_says_how_it_was_made(ended):
    *_, folder = ended
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["guidance_scale"], metrics["gamma"], metrics["seed"]) == (3.5, 0.0, 7)
    assert list(metrics["sets"]) == ["first", "second"] and metrics["sets"]["first"]["prompts"] == 2
    assert list(metrics["sets"]["second"]["student"]) == ["2", "3"]
    page = (folder / "report.html").read_text()
    for text in (
        "student: distilled, in 2 to 3 steps",
        "by its teacher with guidance 3.5.",
        "Used in training, too: 1 of the 2 prompts of first, 1 of the 2 prompts of second.",
        "The first 1 of 2 prompts. All images of a row start from the same noise (seed 7); the "
        "teacher with guidance 3.5; the student with gamma 0.",
        "secret",
        "271828",
        "gradient norm",
        "1 h 2 min",
    ):
        assert text in page
    assert "held-out" not in page and "each style" not in page
    assert {path.name for path in (folder / "samples").iterdir()} == {"first.png", "second.png"}
    images = list((folder / module.IMAGES).rglob("*.png"))
    assert len(images) == 2 * (2 + 2 + 1) * 2  # prompts, steps of all three, sets


def test_curves_are_of_what_was_logged_twice():
    found = [(curve.stage, curve.title, list(curve.values), curve.log) for curve in curves(HISTORY)]
    assert found == [
        ("first", "loss", [0.5, 0.25, 0.2], True),
        ("first", "gradient norm", [2.0, 1.0, 1.0], True),
        ("first", "throughput", [10.0, 12.0], False),
    ]


def test_prompts_are_called_new_only_where_they_are(world):
    def note(trained_on):
        return overlap_note(wanted.prompt_sets, trained_on)

    wanted = loaded(world)
    assert note({"a dog", "a red", "cat"}) == "None of the prompts was used in training."
    assert note({"an ICON "}) == (
        "Used in training, too: 1 of the 3 prompts of first, 1 of the 2 prompts of second."
    )
    assert note({"red", "a dog"}) == "Used in training, too: 1 of the 3 prompts of first."


def loaded(world, **changes):
    given = dict(
        prompts=[str(world / "first.txt"), str(world / "second.txt")], scorers=(), steps=(1,),
        limit=0, guidance_scale=1.0, student_guidance_scales=(1.0,), gamma=1.0, pictures=1,
        name="", seed=0, resolution=None, timesteps={}, trained_on=(),
    )  # fmt: skip
    return FinalEval.load(**given | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=["nowhere.txt"]), "nowhere.txt does not exist"),
        (dict(steps=(9,)), "steps = 9"),
        (dict(steps=()), "steps is empty"),
        (dict(scorers=["clap"]), "unknown scorer 'clap'"),
        (dict(scorers=["miniature.judge"]), "the judge needs each prompt's 'label'"),
    ],
)
def test_what_is_missing_is_found_before_the_run(world, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loaded(world, **change)


def test_two_files_of_one_name_are_refused(world, tmp_path):
    (tmp_path / "first.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match="each with its own name"):
        loaded(world, prompts=[str(world / "first.txt"), str(tmp_path / "first.txt")])
