"""What a recipe has its run hand out: found missing before the run, written after it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax.config import outputs
from tlcm_jax.config.run import TrainResult
from tlcm_jax.config.schema import read
from tlcm_jax.evaluation.health import HEALTH_FILE, HealthLog, health
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.io.lora_files import read_lora
from tlcm_jax.io.model_card import FILES
from tlcm_jax.models import lora
from tlcm_jax.training.checkpoints import Position
from tlcm_jax.training.state import NetworkState, TrainState

RANK, ALPHA = 4, 1.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "teacher")
    (folder / "train.txt").write_text("a red cat\nan icon\n")
    (folder / "test.txt").write_text("a cat of ice\nan icon\nred\n")
    return folder


@pytest.fixture(scope="module")
def recipe(world):
    """DMD2's shape: all that is said of it differs from a default's."""
    return dict(
        name="small",
        seed=11,
        model=dict(path=str(world / "teacher"), resolution=48),
        prompts=[str(world / "train.txt")],
        adapter=dict(rank=RANK, alpha=ALPHA, targets=["to_q", "conv1"]),
        stages=dict(
            last=dict(
                objective="lcd",
                steps=1,
                batch_size=2,
                learning_rate=1e-4,
                settings=dict(segments=4, weight=0.0),
                terms=dict(distribution_matching=dict(guidance_scale=3.0)),
            )
        ),
        evaluation=dict(
            prompts=[str(world / "test.txt")], steps=[3], guidance_scale=2.5, gamma=0.0,
            pictures=1, limit=2,
        ),
        export=["kohya"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(world):
    model = load_model(world / "teacher")
    fresh = lora.init(model.params["unet"], ("to_q", "conv1"), RANK, jax.random.key(0))
    factors = random_adapter(fresh, np.random.default_rng(0), 0.3)
    adapter = lora.scaled(factors, ALPHA / RANK)
    return factors, TrainResult(model=model, adapter=adapter, history=[], completed=True)


def test_a_run_s_exports_and_report_are_its_recipe_s(world, recipe, run, tmp_path):
    _, result = run
    settings = read(recipe)
    wanted = outputs.load_outputs(settings)
    outputs.write_outputs(result, settings, wanted, tmp_path, recipe, started=0.0, progress=False)
    teacher = result.model
    exported = read_lora(
        tmp_path / "export" / "kohya" / FILES["kohya"], teacher.params["unet"], teacher.lora_names
    )
    for ours, theirs in zip(
        jax.tree.leaves(exported), jax.tree.leaves(result.adapter), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-6)  # fp16
    card = (tmp_path / "export" / "kohya" / "README.md").read_text()
    for text in ("by DMD2\n", "| 4 | 999, 749, 499, 249 |", "EulerDiscreteScheduler", "scale 3,",
                 "a LoRA of rank 4, alpha 1, on 2 kinds of layers"):  # fmt: skip
        assert text in card
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["seed"], metrics["gamma"], metrics["guidance_scale"]) == (11, 0.0, 2.5)
    assert metrics["sets"]["test"]["prompts"] == 2 and set(metrics["sets"]["test"]["student"]) == {
        "3"
    }
    page = (tmp_path / "report.html").read_text()
    assert "small: distilled, in 3 steps" in page
    assert "Used in training, too: 1 of the 2 prompts of test." in page
    # The times of the student, not the release's table.
    assert wanted.timesteps[3] == (999, 749, 499) and str(wanted.resolution) == "48x48"


def test_a_preview_is_the_student_as_it_stands(world, recipe, run, tmp_path):
    factors, result = run
    settings = read(recipe | dict(sample_every=5))
    (hook,) = outputs.preview_hooks(settings, result.model, workdir=tmp_path)
    assert hook.every == 5
    student = NetworkState(factors, {}, {})
    state = TrainState(step=np.int32(5), key=jax.random.key(0), networks={"student": student})
    position = Position(0, "last", 5, 5)
    hook.call(position, state)
    with Image.open(tmp_path / "samples" / f"{position.total:06d}.png") as sheet:
        shown = np.asarray(sheet)
    # One of its images, enlarged as sheets are, stands somewhere in it.
    options = GenerationOptions(resolution=48, batch_size=8)
    prompts = ["a cat of ice", "an icon", "red"]
    images = generate(result.model, prompts, 2, 11, result.adapter, 0.0, options, (999, 499))
    scale = round(128 / 48)
    large = np.asarray(
        Image.fromarray(images[1]).resize((48 * scale, 48 * scale), Image.Resampling.LANCZOS)
    )
    rows = np.lib.stride_tricks.sliding_window_view(shown, large.shape)[..., 0, :, :, :]
    corner = np.all(rows[:, :, :4, :4] == large[:4, :4], axis=(2, 3, 4))
    assert any(np.array_equal(rows[y, x], large) for y, x in np.argwhere(corner))
    # And how it stands beside the teacher, of two images of each prompt at 4 steps.
    (row,) = HealthLog(path=tmp_path / HEALTH_FILE).rows()
    assert (row["step"], row["stage"]) == (5, "last")
    times = (999, 749, 499, 249)
    drawn = [
        generate(result.model, prompts, 4, seed, result.adapter, 0.0, options, times)
        for seed in (11, 12)
    ]
    assert row["student"] == pytest.approx(health(np.stack(drawn)))
    drawn = [generate_teacher(result.model, prompts, 25, 2.5, seed, options) for seed in (11, 12)]
    assert row["teacher"] == pytest.approx(health(np.stack(drawn)))


def test_what_is_left_out_is_nothing(recipe, run):
    _, result = run
    without = dict(recipe, evaluation=None)
    assert outputs.load_outputs(read(without)) is None
    empty = dict(recipe, evaluation=dict(recipe["evaluation"], prompts=[]))
    assert outputs.load_outputs(read(empty)) is None
    assert outputs.preview_hooks(read(recipe), result.model, workdir=None) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(export=["onnx"]), "cannot export 'onnx'"),
        (dict(prompts=["nowhere.txt"]), "nowhere.txt does not exist"),
    ],
)
def test_what_is_missing_is_found_before_the_run(recipe, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        outputs.load_outputs(read(recipe | change))


def test_a_place_that_is_taken_is_found_before_the_run(recipe, tmp_path):
    taken = tmp_path / "export" / "kohya" / "thesis.txt"
    taken.parent.mkdir(parents=True)
    chosen = read(recipe | dict(evaluation=None))
    outputs.load_outputs(chosen, tmp_path)
    taken.write_text("")
    with pytest.raises(FileExistsError, match="export/kohya already holds files"):
        outputs.load_outputs(chosen, tmp_path)
    (taken.parent / "README.md").write_text("made with tlcm_jax")  # an earlier export is replaced
    outputs.load_outputs(chosen, tmp_path)


def test_a_run_of_one_process_is_where_it_should_be(recipe, run):
    _, result = run
    assert outputs.gather_to_local(result, read(recipe)) is result
    assert dataclasses.is_dataclass(result)
