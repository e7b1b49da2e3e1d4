"""From a recipe with terms to the engine's stages on a tiny UNet: by shapes, and one real run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tlcm_jax.config.companions import load_companions

from miniature.contrastive import ContrastiveNetwork, ContrastiveScorer, words
from tests.support.cut import cut_after
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.config import companions
from tlcm_jax.config.build import abstract_adapter, blueprints
from tlcm_jax.config.run import distil
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.io.latent_lpips_files import save_latent_lpips
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import is_adapter
from tlcm_jax.models.latent_lpips import LatentLPIPS
from tlcm_jax.training.mesh import make_mesh


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a scorer, a judge and a latent LPIPS, all tiny and random."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_pipeline(folder / "teacher")
    (folder / "prompts.txt").write_text("a red cat\na cat icon\nan icon of a cat\n")
    network = ContrastiveNetwork(widths=(8,), features=8, resolution=8)
    for i, name in enumerate(("scorer", "judge")):
        blank = jnp.zeros((1, 8, 8, 3))
        params = jax.jit(network.init)(jax.random.key(i), blank, words(["a"]))["params"]
        params["words"]["embedding"] = params["words"]["embedding"] * 10
        ContrastiveScorer(network, params, 16.0).save(folder / name)
    distance, blank = LatentLPIPS((4,) * 5), jnp.zeros((1, 4, 4, 4))
    params = jax.jit(distance.init)(jax.random.key(2), blank, blank)["params"]
    save_latent_lpips(folder / "lpips", distance, params, 4, {})
    return folder


def config(world, **changes):
    terms = dict(
        latent_lpips=dict(weights=str(world / "lpips")),
        preference=dict(
            scorer="miniature.contrastive",
            weights=str(world / "scorer"),
            judge="miniature.contrastive",
            judge_weights=str(world / "judge"),
        ),
        distribution_matching=dict(guidance_scale=2.0, critic_updates=2),
        adversarial=dict(critic_updates=1, layers=["mid_block"]),
    )
    stage = dict(
        objective="endpoint_consistency",
        steps=2,
        batch_size=8,
        learning_rate=1e-3,
        settings=dict(segments=2, teacher_substeps=1, rollout_timesteps=[999]),
        terms=terms,
    )
    return (
        dict(
            name="tiny",
            model=dict(path=str(world / "teacher")),
            prompts=[str(world / "prompts.txt")],
            adapter=dict(rank=2, alpha=2.0, merged=True),
            stages=dict(last=stage),
            log_every=1,
            checkpoint_every=1,
            export=["pipeline"],
        )
        | changes
    )


def prepared(world, raw):
    settings = read(raw)
    pipeline = abstract_model(world / "teacher")
    loaded = load_companions(settings)
    mesh = make_mesh({"data": 8})
    return settings, pipeline, loaded, blueprints(settings, pipeline, mesh, loaded)


def with_terms(raw, **terms):
    raw["stages"]["last"]["terms"] = terms
    return raw


def test_every_term_fits_the_real_networks(world):
    """The whole game by its shapes: examples, what critics see, every loss; trained whole."""
    settings, pipeline, loaded, (plan,) = prepared(world, config(world, trainable="full"))
    objective = plan.objective
    assert set(objective.critics) == {"fake", "discriminator"}
    theta = abstract_adapter(settings, pipeline.params["unet"])
    assert jax.tree.structure(theta) == jax.tree.structure(pipeline.params["unet"])

    def conditioning(batch):
        ids = tuple(jax.ShapeDtypeStruct((batch, 77), jnp.int32) for _ in range(2))
        return jax.eval_shape(lambda p, i: pipeline.encode_tokens(p, i), pipeline.params, ids)

    frozen = {
        "unet": pipeline.params["unet"],
        "null": conditioning(1),
        "vae": pipeline.params["vae"],
        **loaded.params,
    }
    texts = loaded.texts(settings.stages["last"], ["a red cat"] * 8)
    batch = {"conditioning": conditioning(8), **texts}
    key = jax.random.key(0)
    critics = {n: jax.eval_shape(c.initial, key) for n, c in objective.critics.items()}
    examples = jax.eval_shape(objective.produce, theta, frozen, batch, key)
    value, metrics = jax.eval_shape(objective.loss, theta, frozen, examples, key, critics)
    assert value.shape == (8,)
    assert {"preference/score", "preference/judge", "latent_lpips/loss"} <= set(metrics)

    def shown(theta, frozen, examples, key):
        return objective.show(theta, frozen)(examples, key)

    made = jax.eval_shape(shown, theta, frozen, examples, key)
    assert made.x0.shape == made.sample.shape == (8, 8, 8, 4)
    for name, critic in objective.critics.items():
        value, _ = jax.eval_shape(critic.loss, critics[name], frozen, made, key)
        assert value.shape == (8,)


def test_what_is_missing_is_said_before_compiling(world):
    raw = with_terms(config(world), adversarial=dict(layers=["up_blocks.0"]))
    with pytest.raises(ValueError, match=r"stages.last: layers = .*this UNet has down_blocks.0"):
        prepared(world, raw)
    raw = with_terms(
        config(world), preference=dict(scorer="miniature.contrastive", weights="nowhere")
    )
    with pytest.raises(FileNotFoundError, match="nowhere holds no scorer"):
        prepared(world, raw)
    raw = with_terms(config(world), preference=dict(scorer="mps", weights=""))
    with pytest.raises(ValueError, match="unknown scorer 'mps'; known: "):
        prepared(world, raw)


def test_without_latent_lpips_the_mean_square_is_alone_and_says_so_once(world, monkeypatch):
    said = []
    monkeypatch.setattr(companions.logging, "warning", lambda *told: said.append(told))
    raw = with_terms(config(world), latent_lpips=dict(weights="nowhere"))
    raw["stages"]["again"] = raw["stages"]["last"]
    _, _, _, plans = prepared(world, raw)
    assert len(said) == 1 and "mean square alone" in said[0][0]
    assert all(plan.settings.terms == {} and plan.objective.show is None for plan in plans)
    assert logging is companions.logging


def test_a_latent_lpips_of_other_latents_is_refused(world, tmp_path):
    distance, blank = LatentLPIPS((4,) * 5), jnp.zeros((1, 4, 4, 8))
    params = jax.jit(distance.init)(jax.random.key(2), blank, blank)["params"]
    save_latent_lpips(tmp_path, distance, params, 8, {})
    raw = with_terms(config(world), latent_lpips=dict(weights=str(tmp_path)))
    with pytest.raises(ValueError, match="for 8 channels, where this model's latents have 4"):
        prepared(world, raw)


def test_a_tree_of_the_base_s_own_leaves_takes_its_place():
    base = {"a": {"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.zeros(2, jnp.bfloat16)}}
    whole = jax.tree.map(lambda x: x.astype(jnp.float32) + 0.5, base)
    merged = lora.merge(base, lora.scaled(whole, 0.125))
    assert merged["a"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), merged, whole)
    assert not is_adapter(whole)
    with pytest.raises(KeyError):
        lora.merge(base, {"b": {"bias": jnp.zeros(2)}})


@pytest.mark.slow
def test_a_game_runs_resumes_and_trains_the_whole_network(world, tmp_path):
    """Two real steps of every term with full fine-tuning, then the same, cut after the first."""
    raw = config(world, trainable="full")
    run = distil(raw, tmp_path / "whole", progress=False)
    rows = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert all(np.isfinite(row[f"{who}/loss"]) for who in ("fake", "discriminator"))
        assert np.isfinite(row["loss"]) and row["preference/gradient"] > 0
    teacher = load_model(world / "teacher")
    student = lora.merge(teacher.params["unet"], run.adapter)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), teacher.params["unet"], student)
    assert moved["conv_in"]["kernel"] and moved["conv_out"]["kernel"]
    with cut_after(1):
        distil(raw, tmp_path / "cut", progress=False)
    again = distil(raw, tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.adapter, run.adapter)
