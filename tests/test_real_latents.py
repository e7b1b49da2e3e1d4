"""Stages on real latents: batches, checks before compiling, and one run of SCott's in small."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
from tlcm_jax.config.companions import Companions

from configs import emoji_dmd2, emoji_hyper_sd, emoji_lcm, emoji_mcm, emoji_pcm, emoji_scott
from tests.support.cut import cut_after
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import paths
from tlcm_jax.config.build import blueprints
from tlcm_jax.config.run import PromptBatches, distil
from tlcm_jax.config.schema import read
from tlcm_jax.data.latents import read_latents
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.io.workdir import load_adapter
from tlcm_jax.training.mesh import make_mesh

CAPTIONS = ("a red cat", "a cat icon", "an icon of a cat", "a red icon of a cat", "a cat")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "teacher")
    (folder / "prompts.txt").write_text("a red icon\n")
    latents = np.random.default_rng(0).normal(size=(5, 8, 8, 4)).astype(np.float16)
    np.savez(folder / "latents.npz", latents=latents, captions=np.array(CAPTIONS))
    return folder


def config(world, **changes):
    settings = dict(
        mode="data",
        segments=1,
        skip=24,
        teacher_substeps=2,
        solver="sde",
        loss_space="x0",
        target="average",
        guidance_scale=2.0,
    )
    stage = dict(
        objective="segment_consistency",
        steps=2,
        batch_size=8,
        epochs=2,
        learning_rate=1e-2,
        ema_decay=0.5,
        settings=settings,
        terms=dict(adversarial=dict(weight=0.4, critic_updates=1, layers=["mid_block"])),
    )
    return dict(
        name="tiny",
        model=dict(path=str(world / "teacher")),
        prompts=[str(world / "prompts.txt")],
        latents=str(world / "latents.npz"),
        adapter=dict(rank=2, alpha=2.0, merged=True),
        stages=dict(only={**stage, **changes}),
        log_every=1,
        checkpoint_every=1,
        export=["lora"],
    )


def test_a_batch_holds_latents_beside_their_own_captions(world):
    settings = read(config(world))
    pipeline, mesh = load_model(world / "teacher"), make_mesh({"data": 8})
    latents = read_latents(settings.latents, pipeline.latent_shape())
    batches = PromptBatches(pipeline, ["a red icon"], mesh, settings, Companions(), latents)
    batch = batches.stage(0, settings.stages["only"])(3)
    found = np.asarray(batch["latents"])
    rows = [int(np.flatnonzero(np.all(latents.latents == x, axis=(1, 2, 3)))[0]) for x in found]
    assert len(set(rows)) == 5  # eight of five pictures: all of them
    expected = pipeline.encode([CAPTIONS[row] for row in rows])
    np.testing.assert_allclose(
        batch["conditioning"].prompt_embeds, expected.prompt_embeds, rtol=1e-4, atol=1e-5
    )
    plain = read(config(world, settings={}, terms={})).stages["only"]
    assert set(batches.stage(0, plain)(0)) == {"conditioning"}


@pytest.mark.parametrize("recipe", [emoji_dmd2, emoji_hyper_sd, emoji_lcm, emoji_mcm, emoji_pcm,
                                    emoji_scott])  # fmt: skip
def test_every_relative_fits_the_miniature_teacher(recipe):
    settings = read(recipe.get_config().to_dict())
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    plans = blueprints(settings, abstract_model(paths.EMOJI_XL), mesh)
    assert [plan.name for plan in plans] == list(settings.stages)


def test_what_is_missing_is_said_before_compiling(world, tmp_path):
    raw = config(world)
    del raw["latents"]
    with pytest.raises(ValueError, match="stages.only makes its states of real latents: set"):
        distil(raw, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere.npz does not exist"):
        distil(config(world) | {"latents": "nowhere.npz"}, tmp_path / "run")
    with pytest.raises(ValueError, match="stages.only: target = 'average' needs one: set ema"):
        distil(config(world, ema_decay=0.0), tmp_path / "run")
    with pytest.raises(ValueError, match="stages.only: ema_decay must lie in 0"):
        distil(config(world, ema_decay=1.0), tmp_path / "run")
    with pytest.raises(ValueError, match="stages.only: epochs must be at least 1, got 0"):
        distil(config(world, epochs=0), tmp_path / "run")
    with pytest.raises(ValueError, match="critics are shown the student's own goal"):
        distil(config(world, terms=dict(adversarial=dict(real="goal"))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stochastic_stage_runs_resumes_and_leaves_its_average(world, tmp_path):
    run = distil(config(world), tmp_path / "whole", progress=False)
    rows = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    assert rows[0]["examples"] == 8 and rows[0]["adversarial/gradient"] > 0
    # Of an example: made by 2 guided calls, then in each of 2 epochs target, student, what the
    # discriminator is shown, and 2 + 1 of its own.
    ratio = rows[1]["unet_evaluations_per_second"] / rows[1]["samples_per_second"]
    assert ratio == pytest.approx(4 + 2 * (2 + 1 + 3))
    with cut_after(1):
        distil(config(world), tmp_path / "cut", progress=False)
    again = distil(config(world), tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.adapter, run.adapter)
    _, stored = load_adapter(tmp_path / "whole")
    found = flax.traverse_util.flatten_dict(run.adapter)
    for path, leaf in flax.traverse_util.flatten_dict(stored).items():
        np.testing.assert_array_equal(leaf, found[path])
    assert any(np.any(leaf) for path, leaf in found.items() if path[-1] == "lora_B")
