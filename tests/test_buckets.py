"""Training on images of several sizes, from recipe to adapter, on a toy and on a tiny SDXL."""

import itertools

import jax
import numpy as np
import pytest

from tests.support import sized_family
from tests.support.tiny_pipeline import write_tiny_pipeline
from tests.support.toy_family import write_toy
from tlcm_jax.config.build import load_losses
from tlcm_jax.config.run import PromptBatches, train
from tlcm_jax.config.schema import read
from tlcm_jax.data.buckets import Buckets
from tlcm_jax.distillation.objective import LATENT_SHAPE
from tlcm_jax.families import load
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.training.loop import Hook
from tlcm_jax.training.mesh import make_mesh

MIX = {"32x32": 1.0, "48x32": 0.5, "32x48": 0.5}
STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "sdxl")
    write_toy(folder / "toy")
    (folder / "prompts.txt").write_text("a red cat\na cat icon\nan icon of a cat\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "FAMILIES", dict(load.FAMILIES))
        sized_family.register()
        yield folder


def recipe(world, teacher="toy", **model):
    stage = dict(
        objective="mlcd", steps=STEPS, learning_rate=1e-3, batch_size=24, prompts_per_refill=8,
        settings=dict(segments=2, points_per_segment=1, guidance_scale=2.0),
    )  # fmt: skip
    targets = dict(targets=["fc1", "fc2"]) if teacher == "toy" else {}
    return dict(
        name="tiny", seed=3, model=dict(path=str(world / teacher), **model),
        prompts=[str(world / "prompts.txt")], adapter=dict(rank=2, alpha=2.0, **targets),
        stages=dict(only=stage), log_every=1, checkpoint_every=2, export=["lora"],
    )  # fmt: skip


class Stopped(Exception):
    pass


def stopping(at):
    def stop(position, state):
        if position.step == at:
            raise Stopped

    return lambda settings, model: [Hook(every=1, call=stop)]


def test_a_resumed_run_draws_the_same_buckets(world, tmp_path, monkeypatch):
    config, drawn = recipe(world, buckets=MIX), []
    at = Buckets.at
    monkeypatch.setattr(Buckets, "at", lambda own, r: drawn.append((r, at(own, r))) or drawn[-1][1])
    whole = train(config, tmp_path / "whole", progress=False)
    sizes = [size for _, size in drawn]
    assert [r for r, _ in drawn] == list(range(STEPS)) and len(set(sizes)) == 3
    drawn.clear()
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", progress=False, make_hooks=stopping(3))
    again = train(config, tmp_path / "cut", progress=False)
    assert [size for _, size in drawn] == [*sizes[:3], *sizes[2:]]
    jax.tree.map(np.testing.assert_array_equal, again.adapter, whole.adapter)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]


def test_one_bucket_is_the_run_without_buckets(world, tmp_path):
    plain, bucket = (
        train(recipe(world, **model), tmp_path / name, progress=False)
        for name, model in (
            ("plain", dict(resolution="48x32")),
            ("bucket", dict(buckets={"48x32": 0.3})),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, bucket.adapter, plain.adapter)
    assert [row["loss"] for row in bucket.history] == [row["loss"] for row in plain.history]


def test_a_batch_is_told_its_size(world):
    settings = read(recipe(world, "sdxl", buckets=MIX))
    model = load_model(world / "sdxl")
    losses = load_losses(settings, model)
    batches = PromptBatches(model, ["a cat"], make_mesh({"data": 8}), settings)
    of = batches.of("only", losses["only"])
    seen = set()
    for batch in map(of, itertools.takewhile(lambda r: len(seen) < 3, itertools.count())):
        height, width, channels = batch[LATENT_SHAPE].shape
        assert channels == 4
        expected = [4 * height, 4 * width, 0, 0, 4 * height, 4 * width]
        np.testing.assert_array_equal(batch["conditioning"].time_ids, [expected] * 8)
        seen.add((height, width))
    assert seen == {(8, 8), (8, 12), (12, 8)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(resolution="50x32"), "50x32 must be a multiple of 4: the nearest is 52x32"),
        (dict(resolution="50"), "50 must be a multiple of 4: the nearest is 52"),
        (dict(buckets={"32x32": 1.0, "33x32": 1.0}), "33x32 must be a multiple of 4"),
        (dict(buckets={"32x32": 0.0}), "model.buckets.'32x32'. = 0.0: must be above 0"),
        (dict(buckets={"32x32": 1.0, "32": 1.0}), "a size stands there twice"),
        (dict(buckets={"wide": 1.0}), "model.buckets: resolution 'wide': give WIDTHxHEIGHT"),
        (dict(buckets={"32x32": "much"}), "model.buckets.32x32' must be float, got 'much'"),
        (dict(resolution="wide"), "model.resolution 'wide': give WIDTHxHEIGHT"),
        (dict(resolution=1.5), "model.resolution' must be int, got 1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(world, model, message):
    with pytest.raises(ValueError, match=message):
        load_losses(read(recipe(world, "sdxl", **model)), abstract_model(world / "sdxl"))


def test_real_latents_are_of_one_size(world):
    config = recipe(world, "sdxl", buckets=MIX) | dict(latents="latents.npz")
    config["stages"]["only"]["settings"] = dict(mode="data", segments=2)
    with pytest.raises(ValueError, match="real latents, which are of one size: leave model.buck"):
        load_losses(read(config), abstract_model(world / "sdxl"))
