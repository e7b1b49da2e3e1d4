"""The main job by two processes, to its report and exports: as one process ends it."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file

from tests.support.processes import all_end_well, environments
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import paths

RECIPE = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        name="two",
        model=dict(path="{teacher}"),
        prompts=("{prompts}",),
        adapter=dict(rank=2, alpha=0.25),
        stages=dict(segments=dict(
            objective="mlcd", steps=1, batch_size=4, learning_rate=1e-2,
            settings=dict(segments=2, points_per_segment=1, guidance_scale=2.0),
        )),
        mesh=dict(data=1, fsdp=-1),
        evaluation=dict(prompts=("{prompts}",), steps=(2,), guidance_scale=2.0, pictures=3),
        export=("lora", "pipeline"),
    ))
"""


def start(folder, environment):
    command = [sys.executable, "-m", "tlcm_jax.main", "--noprogress"]
    command += ["--config", str(folder / "recipe.py"), "--workdir", str(folder / "run")]
    return subprocess.Popen(
        [*command, "--compilation_cache", ""],
        cwd=paths.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left(run):
    """What the end of a run wrote, read and removed, so that the next command writes it again."""
    picture = np.asarray(PIL.Image.open(run / "samples" / "prompts.png")).astype(int)
    exported = run / "export"
    found = {p.relative_to(exported): load_file(p) for p in exported.rglob("*.safetensors")}
    assert "a red cat" in (run / "report.html").read_text()
    metrics = json.loads((run / "metrics.json").read_text())["sets"]["prompts"]
    assert set(metrics["student"]) == {"2"} and set(metrics["teacher"]) == {"4", "25"}
    for name in ("samples/prompts.png", "report.html", "metrics.json"):
        (run / name).unlink()
    shutil.rmtree(run / "images")
    return picture, found


@pytest.mark.slow
def test_two_processes_end_a_run_as_one(tmp_path):
    teacher, prompts = write_tiny_pipeline(tmp_path / "teacher"), tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na cat icon\nan icon of a cat\n")
    (tmp_path / "recipe.py").write_text(RECIPE.format(teacher=teacher, prompts=prompts))
    flags = os.environ["XLA_FLAGS"]
    two = environments(2, flags.replace("device_count=8", "device_count=2"))
    all_end_well([start(tmp_path, environment) for environment in two])
    picture, exported = left(tmp_path / "run")
    assert len(exported) >= 2

    # One process, its mesh another, finds the run trained, and draws and exports it again.
    one = {**os.environ, "XLA_FLAGS": flags.replace("device_count=8", "device_count=1")}
    all_end_well([start(tmp_path, one)])
    again, exported_again = left(tmp_path / "run")
    assert np.abs(picture - again).max() <= 1  # of 255: sums in another order
    jax.tree.map(np.testing.assert_array_equal, exported, exported_again)
