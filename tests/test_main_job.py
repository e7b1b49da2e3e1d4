"""The main job from recipe to report, on a tiny random teacher and a mesh of eight devices."""

import copy
import json

import flax.traverse_util
import jax
import numpy as np
import pytest

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.config.outputs import load_outputs, write_outputs
from tlcm_jax.config.run import train
from tlcm_jax.config.schema import read
from tlcm_jax.config.workdir import load_adapter
from tlcm_jax.families.load import load_model
from tlcm_jax.io.lora_files import read_lora
from tlcm_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "teacher")
    (folder / "prompts.txt").write_text("a red cat\na cat icon\n# a comment\nan icon of a cat\n")
    return folder


@pytest.fixture
def config(world):
    stage = dict(steps=2, learning_rate=1e-3)
    return dict(
        name="tiny",
        seed=3,
        model=dict(path=str(world / "teacher")),
        prompts=[str(world / "prompts.txt")],
        adapter=dict(rank=2, alpha=0.25, merged=True),
        stage_order=["segments", "endpoints"],
        stages=dict(
            segments=dict(
                stage,
                objective="mlcd",
                batch_size=24,
                prompts_per_refill=8,
                settings=dict(segments=2, points_per_segment=1, guidance_scale=2.0),
            ),
            endpoints=dict(
                stage,
                objective="lcd",
                batch_size=8,
                settings=dict(
                    segments=2, teacher_substeps=1, guidance_scale=2.0, rollout_timesteps=(999,)
                ),
            ),
        ),
        log_every=1,
        checkpoint_every=1,
        evaluation=dict(
            prompts=[str(world / "prompts.txt")],
            steps=[1, 4],
            guidance_scale=2.0,
            gamma=0,
            pictures=2,
        ),
        export=["lora", "pipeline"],
    )


def test_from_recipe_to_report(world, config, tmp_path):
    wanted = load_outputs(read(config))
    run = train(config, tmp_path, progress=False)
    assert run.completed
    write_outputs(run, read(config), wanted, tmp_path, config, started=0.0, progress=False)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["stage_step"]) for row in rows] == [
        ("segments", 1), ("segments", 2), ("endpoints", 1), ("endpoints", 2),
    ]  # fmt: skip
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert [row["pairs"] for row in rows] == [24, 24, 8, 8]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["sets"]["prompts"]["student"]) == {"1", "4"}
    page = (tmp_path / "report.html").read_text()
    assert "a red cat" in page and "data:image/png" in page
    assert "Used in training, too: 3 of the 3 prompts of prompts." in page
    card = (tmp_path / "export" / "lora" / "README.md").read_text()
    assert "- Data: Prompts alone; no image was read." in card and "- Method: TLCM\n" in card
    assert (tmp_path / "samples" / "prompts.png").is_file()

    # What was exported is what was trained, and the pipeline is the teacher with it merged in.
    teacher = load_model(world / "teacher")
    trained = flax.traverse_util.flatten_dict(run.adapter)
    exported = read_lora(tmp_path / "export" / "lora", teacher.params["unet"], teacher.lora_names)
    for path, leaf in flax.traverse_util.flatten_dict(exported).items():
        np.testing.assert_allclose(leaf, trained[path], rtol=2e-3, atol=1e-6)  # fp16
    _, stored = load_adapter(tmp_path)
    for path, leaf in flax.traverse_util.flatten_dict(stored).items():
        np.testing.assert_array_equal(leaf, trained[path])
    assert any(np.any(leaf) for path, leaf in trained.items() if path[-1] == "lora_B")
    # Once scaled by alpha / rank, whatever reads it; what is trained is not.
    raw = Checkpoints(tmp_path / "checkpoints", keep=None).trained()
    for path, leaf in flax.traverse_util.flatten_dict(raw).items():
        scale = 0.125 if path[-1] == "lora_B" else 1.0
        np.testing.assert_allclose(trained[path], scale * leaf, rtol=1e-6)

    # The same command again has nothing left to train, and says the same.
    again = train(config, tmp_path, progress=False)
    assert again.completed and len(again.history) == 4
    jax.tree.map(np.testing.assert_array_equal, again.adapter, run.adapter)


def changed(config, **dotted):
    config = copy.deepcopy(config)
    for path, value in dotted.items():
        *parents, last = path.split("__")
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
    return config


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model__path="nowhere"), FileNotFoundError, "'nowhere' is not a folder"),
        (dict(prompts=["nowhere.txt"]), FileNotFoundError, "nowhere.txt does not exist"),
        (
            dict(stages__segments__prompts_per_refill=12),
            ValueError,
            "per_refill is 12, which the 8",
        ),
        (dict(stages__segments__batch_size=16), ValueError, "24 pairs, which batch_size = 16"),
        (dict(stages__segments__updates=3), ValueError, "updates'; it is `steps` .* now"),
        (dict(mesh=dict(data=3)), ValueError, "does not fit 8 devices"),
        (dict(sede=1), ValueError, "did you mean 'seed'"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(config, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train(changed(config, **change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(export=["onnx"]), "cannot export 'onnx'"),
        (dict(evaluation__steps=[9]), "steps = 9"),
        (dict(evaluation__scorers=["miniature.judge=nowhere"]), "nowhere holds no judge"),
    ],
)
def test_what_the_end_needs_is_checked_at_the_start(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_outputs(read(changed(config, **change)))
