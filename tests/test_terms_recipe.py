"""A recipe with every term on a tiny UNet, run: what it writes, that it repeats, what is said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tests.support.cut import cut_after
from tests.support.tiny_world import all_terms, tiny_recipe, write_tiny_world
from tlcm_jax.config.build import load_losses
from tlcm_jax.config.run import train
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model, load_model
from tlcm_jax.io.latent_lpips_files import save_latent_lpips
from tlcm_jax.models import lora
from tlcm_jax.models.adapters import is_adapter
from tlcm_jax.models.latent_lpips import LatentLPIPS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


def config(world, terms=None, **changes):
    stage = dict(
        objective="lcd",
        steps=2,
        batch_size=8,
        learning_rate=1e-3,
        settings=dict(segments=2, teacher_substeps=1, rollout_timesteps=[999]),
        terms=all_terms(world) if terms is None else terms,
    )
    return tiny_recipe(world, dict(last=stage), **changes)


def losses_of(world, raw):
    return load_losses(read(raw), abstract_model(world / "teacher"))


def test_without_latent_lpips_the_mean_square_is_alone_and_says_so_once(world, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "log_first_n", lambda *told: warned.append(told))
    raw = config(world, dict(latent_lpips=dict(weights="nowhere")))
    raw["stages"]["again"] = raw["stages"]["last"]
    raw["stage_order"].append("again")
    losses = losses_of(world, raw)
    assert len(warned) == 1 and "mean square alone" in warned[0][1]
    assert all(loss.terms == {} and loss.aux == {} for loss in losses.values())


def test_a_latent_lpips_of_other_latents_is_refused(world, tmp_path):
    distance, blank = LatentLPIPS((4,) * 5), jnp.zeros((1, 4, 4, 8))
    params = jax.jit(distance.init)(jax.random.key(2), blank, blank)["params"]
    save_latent_lpips(tmp_path, distance, params, 8, {})
    raw = config(world, dict(latent_lpips=dict(weights=str(tmp_path))))
    with pytest.raises(ValueError, match="for 8 channels, where this model's latents have 4"):
        losses_of(world, raw)


def test_a_tree_of_the_base_s_own_leaves_takes_its_place():
    base = {"a": {"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.zeros(2, jnp.bfloat16)}}
    whole = jax.tree.map(lambda x: x.astype(jnp.float32) + 0.5, base)
    merged = lora.merge(base, lora.scaled(whole, 0.125))
    assert merged["a"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), merged, whole)
    assert not is_adapter(whole)
    with pytest.raises(KeyError):
        lora.merge(base, {"b": {"bias": jnp.zeros(2)}})


def rows_of(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


# 3 minutes of compilation; by shapes it is in tests/config/test_build.py.
@pytest.mark.slow
def test_every_term_and_auxiliary_network_trains_an_adapter_beside_its_base(world, tmp_path):
    run = train(config(world), tmp_path, progress=False)
    rows = rows_of(tmp_path)
    assert [row["stage_step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
        for term in all_terms(world):
            assert row[f"{term}/grad_norm"] > 0
        for who in ("fake_score", "discriminator", "consistency"):
            assert row[f"{who}/grad_norm"] > 0
        # The scorer's gradient never outweighs the loss's.
        assert row["preference/grad_norm"] <= 0.3001 * row["consistency/grad_norm"]
    # Within Adam's reach of what they began as: 2 steps at rate 1e-3; B is scaled by 1/8.
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.adapter):
        if path[-1].key == "lora_B":
            assert 0 < np.abs(leaf).max() < 2.01e-3 * 0.125


@pytest.mark.slow
def test_full_fine_tuning_with_every_term_runs_and_resumes(world, tmp_path):
    """Two real steps of every term, then the same, cut after the first."""
    raw = config(world, trainable="full", export=["pipeline"])
    run = train(raw, tmp_path / "whole", progress=False)
    rows = rows_of(tmp_path / "whole")
    assert len(rows) == 2
    for row in rows:
        assert all(np.isfinite(row[f"{who}/loss"]) for who in ("fake_score", "discriminator"))
        assert np.isfinite(row["loss"]) and row["preference/grad_norm"] > 0
    teacher = load_model(world / "teacher")
    student = lora.merge(teacher.params["unet"], run.adapter)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), teacher.params["unet"], student)
    assert moved["conv_in"]["kernel"] and moved["conv_out"]["kernel"]
    with cut_after(1):
        train(raw, tmp_path / "cut", progress=False)
    again = train(raw, tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.adapter, run.adapter)
