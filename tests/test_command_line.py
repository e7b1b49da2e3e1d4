"""What the trainer's command line says of arguments that are wrong, before it trains."""

import os
import subprocess
import sys

import pytest

from tlcm_jax import paths


def command(recipe, folder, *overrides):
    words = ["--config", str(recipe), "--workdir", str(folder / "run"), *overrides]
    return subprocess.run(
        [sys.executable, "-m", "tlcm_jax.main", *words],
        cwd=paths.ROOT,
        env={**os.environ, "XLA_FLAGS": ""},  # one device, as the recipes want it
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("emoji", ["--config.stages.segments2.stepz=3"], "did you mean 'steps'"),
        # A key that the recipe leaves at its default.
        ("emoji", ["--config.stages.segments2.ema_decay=2"], "ema_decay = 2"),
        ("emoji", ["--config.stages.nowhere.steps=3"], "does not have: 'nowhere'"),
        ("emoji", ["--config.seed.more=3"], "sets a part of"),
        ("emoji", ["--config.evaluation=None"], "--config.evaluation.prompts='()' leaves the"),
        # Leaves the evaluation out: the next mistake is what is said.
        ("emoji", ["--config.evaluation.prompts=()", "--config.prompts=('no',)"], "no does not"),
        ("emoji", ["--config.stages.segments2.updates=3"], "it is `steps` (which counts optimiser"),
        ("nowhere", [], "configs/nowhere.py"),
        ("emoji_full", ["--config.stages.matching.terms.adversarial.weight=-1"], "at least 0"),
    ],
)
def test_a_wrong_argument_is_an_error_without_a_trace(tmp_path, recipe, overrides, said):
    ended = command(f"configs/{recipe}.py", tmp_path, *overrides)
    assert ended.returncode == 1
    assert "error: " in ended.stderr and said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_recipe_s_own_mistake_keeps_its_trace(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("def get_config():\n    return {}.nothing\n")
    ended = command(recipe, tmp_path)
    assert ended.returncode == 1
    assert f'File "{recipe}", line 2, in get_config' in ended.stderr
