"""Several draws of a prompt: the folders that benchmarks read, and how various the images are."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_evaluate import run_command
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.evaluation.evaluate import evaluate
from tlcm_jax.evaluation.more_draws import DIVERSITY, layout_rows, with_diversity
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.generate import GenerationOptions, generate

ROWS = [
    {"tag": "single_object", "include": [{"class": "cat"}], "prompt": "a red cat"},
    {"tag": "counting", "exclude": [{"class": "icon"}], "prompt": "an icon"},
]
PROMPTS = tuple(row["prompt"] for row in ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def drawn(model, seed):
    return generate(load_model(model), PROMPTS, 2, seed, options=GenerationOptions(batch_size=25))


def command(model, prompts, tmp_path, layout, *more):
    run_command(
        *(f"--model={model}", f"--prompts={prompts}", f"--output={tmp_path / 'out'}"),
        *("--steps=2", f"--layout={layout}", "--seed=3", *more),
    )
    return tmp_path / "out" / layout / "student-2-steps"


def jsonl(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_geneval_s_folder(model, tmp_path):
    folder = command(model, jsonl(tmp_path, ROWS), tmp_path, "geneval")
    images = [drawn(model, 3 + draw) for draw in range(4)]
    for number, row in enumerate(ROWS):
        assert json.loads((folder / f"{number:05d}/metadata.jsonl").read_text()) == row
        for draw in range(4):
            with Image.open(folder / f"{number:05d}/samples/{draw:04d}.png") as found:
                np.testing.assert_array_equal(np.asarray(found), images[draw][number])
    assert len(list(folder.rglob("*.png"))) == 8


def test_dpg_s_folder(model, tmp_path):
    rows = [{"item_id": f"id{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    folder = command(model, jsonl(tmp_path, rows), tmp_path, "dpg")
    images = [drawn(model, 3 + draw) for draw in range(4)]
    with Image.open(folder / "id1.png") as found:
        grid = np.asarray(found)
    assert grid.shape == (64, 64, 3) and len(list(folder.iterdir())) == 2
    for draw, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], images[draw][1])


def test_hpd_s_folder(model, tmp_path):
    (tmp_path / "anime.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    folder = command(model, tmp_path / "anime.txt", tmp_path, "hpd", "--blind", "--teacher",
                     str(model))  # fmt: skip
    assert sorted(path.name for path in (folder / "anime").iterdir()) == ["00000.jpg", "00001.jpg"]
    assert "teacher, 25 steps" in (tmp_path / "out/blind.html").read_text()


@pytest.mark.parametrize(
    ("layout", "rows", "message"),
    [
        ("geneval", [{"prompt": "another"}], "line 1: its prompt is not 'a red cat'"),
        ("geneval", [ROWS[0], [1]], "line 2"),
        ("dpg", [{"prompt": "a red cat"}], "'item_id' must be a file's name"),
        ("dpg", [{"prompt": "a red cat", "item_id": "../x"}], "'item_id' must be a file's name"),
    ],
)
def test_what_a_layout_lacks_is_said(layout, rows, message, tmp_path):
    prompts = PromptSet(name="rows", prompts=PROMPTS[: len(rows)])
    with pytest.raises(ValueError, match=message):
        layout_rows(layout, str(jsonl(tmp_path, rows)), prompts)
    with pytest.raises(ValueError, match="needs the benchmark's .jsonl"):
        layout_rows(layout, "prompts.txt", prompts)


def test_diversity_is_the_mean_distance_of_the_draws(model):
    pipeline = load_model(model)
    sets = [PromptSet(name="few", prompts=(*PROMPTS, "red"))]
    result = evaluate(pipeline, sets, steps=[2], seed=3)
    found = with_diversity(
        result,
        lambda first, second: jnp.mean(jnp.abs(first - second), axis=(1, 2, 3)),
        count=2,
        prompts=2,
        options=GenerationOptions(batch_size=25),
        store=None,
    )
    first, second = (drawn(model, seed).astype(np.float64) / 127.5 for seed in (3, 4))
    scores = found.sets[0].find("student", 2).scores
    assert scores[DIVERSITY.key] == pytest.approx(np.abs(first - second).mean(), rel=1e-3)
    assert found.measures[-1] == DIVERSITY and not result.measures


def test_geneval2_s_images_by_prompt(model, tmp_path):
    rows = [{"prompt": prompt, "atom_count": 2, "vqa_list": [["?", "Yes"]]} for prompt in PROMPTS]
    folder = command(model, jsonl(tmp_path, rows), tmp_path, "geneval2")
    paths = json.loads((folder / "images.json").read_text())
    assert tuple(paths) == PROMPTS
    for path, image in zip(paths.values(), drawn(model, 3), strict=True):
        with Image.open(path) as found:
            np.testing.assert_array_equal(np.asarray(found), image)
