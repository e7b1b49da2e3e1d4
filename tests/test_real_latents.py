"""Stages on real latents: batches, checks before compiling, and one run of SCott's in small."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest

from configs import emoji_dmd2, emoji_hyper_sd, emoji_lcm, emoji_mcm, emoji_pcm, emoji_scott
from tests.support.cut import cut_after
from tests.support.tiny_world import CAPTIONS, tiny_recipe, write_tiny_world
from tlcm_jax import paths
from tlcm_jax.config.build import load_losses, stage_spec
from tlcm_jax.config.run import PromptBatches, train
from tlcm_jax.config.schema import read
from tlcm_jax.config.workdir import load_adapter
from tlcm_jax.data.latents import read_latents
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.training.mesh import make_mesh


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


def config(world, **changes):
    settings = dict(
        mode="data",
        segments=1,
        skip=24,
        teacher_substeps=2,
        solver="sde",
        loss_space="x0",
        target="ema",
        guidance_scale=2.0,
    )
    stage = dict(
        objective="mlcd",
        steps=2,
        batch_size=8,
        epochs=2,
        learning_rate=1e-2,
        ema_decay=0.5,
        settings=settings,
        terms=dict(adversarial=dict(weight=0.4, aux_updates=1, layers=["mid_block"])),
    )
    stages = dict(only={**stage, **changes})
    return tiny_recipe(world, stages, latents=str(world / "latents.npz"))


def test_a_batch_holds_latents_beside_their_own_captions(world):
    settings = read(config(world))
    model, mesh = load_model(world / "teacher"), make_mesh({"data": 8})
    latents = read_latents(settings.latents, model.latent_shape())
    losses = load_losses(settings, model)
    batches = PromptBatches(model, ["a red icon"], mesh, settings, latents)
    batch = batches.of("only", losses["only"])(3)
    found = np.asarray(batch["latents"])
    rows = [int(np.flatnonzero(np.all(latents.latents == x, axis=(1, 2, 3)))[0]) for x in found]
    assert len(set(rows)) == 5  # eight of five pictures: all of them
    expected = model.encode([CAPTIONS[row] for row in rows])
    np.testing.assert_allclose(
        batch["conditioning"].prompt_embeds, expected.prompt_embeds, rtol=1e-4, atol=1e-5
    )
    plain = read(config(world, settings={}, terms={}, ema_decay=0.0))
    loss = load_losses(plain, model)["only"]
    assert set(batches.of("only", loss)(0)) == {"conditioning", "inputs"}


@pytest.mark.parametrize("recipe", [emoji_dmd2, emoji_hyper_sd, emoji_lcm, emoji_mcm, emoji_pcm,
                                    emoji_scott])  # fmt: skip
def test_every_relative_fits_the_miniature_teacher(recipe):
    settings = read(recipe.get_config().to_dict())
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    losses = load_losses(settings, abstract_model(paths.EMOJI_XL))
    for name, stage in settings.stages.items():
        spec = stage_spec(name, stage, losses[name], mesh, lambda r: None, {})
        assert spec.steps == stage.steps and spec.nfe_per_pair > 2


def test_what_is_missing_is_said_before_compiling(world, tmp_path):
    raw = config(world)
    del raw["latents"]
    with pytest.raises(ValueError, match="stages.only makes its states of real latents: set"):
        train(raw, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere.npz does not exist"):
        train(config(world) | {"latents": "nowhere.npz"}, tmp_path / "run")
    with pytest.raises(ValueError, match="stages.only: target = 'ema' needs one: set ema"):
        train(config(world, ema_decay=0.0), tmp_path / "run")
    with pytest.raises(ValueError, match="stages.only: ema_decay = 1.0: must lie in 0"):
        train(config(world, ema_decay=1.0), tmp_path / "run")
    with pytest.raises(ValueError, match="stages.only: epochs = 0: must be at least 1"):
        train(config(world, epochs=0), tmp_path / "run")
    with pytest.raises(ValueError, match="auxiliary networks are shown the student's own target"):
        train(config(world, terms=dict(adversarial=dict(real="target"))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stochastic_stage_runs_resumes_and_leaves_its_ema(world, tmp_path):
    run = train(config(world), tmp_path / "whole", progress=False)
    rows = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    assert rows[0]["pairs"] == 8 and rows[0]["adversarial/grad_norm"] > 0
    # Of a visit of a pair: half of 2 guided calls, target, student, what the discriminator is
    # shown, and 2 + 1 of its own.
    assert rows[1]["nfe_per_second"] / rows[1]["pairs_per_second"] == pytest.approx(2 + 2 + 1 + 3)
    with cut_after(1):
        train(config(world), tmp_path / "cut", progress=False)
    again = train(config(world), tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.adapter, run.adapter)
    _, stored = load_adapter(tmp_path / "whole")
    found = flax.traverse_util.flatten_dict(run.adapter)
    for path, leaf in flax.traverse_util.flatten_dict(stored).items():
        np.testing.assert_array_equal(leaf, found[path])
    assert any(np.any(leaf) for path, leaf in found.items() if path[-1] == "lora_B")
