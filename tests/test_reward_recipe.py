"""A recipe that follows a Python function of images, run on a tiny pipeline."""

import jax
import numpy as np
import pytest

from tests.support.cut import cut_after
from tests.support.tiny_world import tiny_recipe, write_tiny_world
from tlcm_jax.config.build import load_losses
from tlcm_jax.config.run import train
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


def config(world, steps=24, **scorer):
    chosen = dict(scorer="tests.support.rewards", weights="redder") | scorer
    stage = dict(
        objective="lcd",
        steps=steps,
        batch_size=192,
        prompts_per_refill=64,
        learning_rate=1e-2,
        settings=dict(
            segments=8,
            # Lower than sampling begins: an untrained network says little of pure noise.
            rollout_timesteps=[499, 374, 249],
            states="visited",
            states_per_rollout=3,
            weight=0.0,
        ),
        terms=dict(reward=dict(weight=1.0, scorers=dict(redder=chosen))),
    )
    return tiny_recipe(world, dict(reward=stage), checkpoint_every=2)


def test_what_the_recipe_cannot_follow_is_said_by_name(world):
    model = abstract_model(world / "teacher")

    def prompt_inputs(**scorer):
        loss = load_losses(read(config(world, **scorer)), model)["reward"]
        return loss.prompt_inputs(["a red cat"] * 2)

    assert prompt_inputs()["reward"]["prompts"].shape == (2, 9)
    with pytest.raises(ValueError, match="stages.reward: unknown scorer 'redness'; known: "):
        prompt_inputs(scorer="redness")
    with pytest.raises(ValueError, match="stages.reward: scorer tests.support.rewards=blue: give"):
        prompt_inputs(weights="blue")
    with pytest.raises(ValueError, match="'rewards' has no 'green' of a single image"):
        prompt_inputs(measure="green")
    with pytest.raises(ValueError, match="stages.reward.terms.reward.scorers.redder: weight = -1"):
        prompt_inputs(weight=-1)


@pytest.mark.slow
def test_a_reward_without_a_gradient_rises(world, tmp_path):
    rows = train(config(world), tmp_path, progress=False).history
    scores = [row["reward/redder/score"] for row in rows]
    print(np.round(scores, 3))
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.08


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_bit_for_bit(world, tmp_path):
    whole = train(config(world, 4), tmp_path / "whole", progress=False)
    with cut_after(2):
        train(config(world, 4), tmp_path / "cut", progress=False)
    again = train(config(world, 4), tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.adapter, whole.adapter)
