"""A reward that no gradient could follow: scored on the host, whatever the mesh; and it rises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.gaussian_world import keys, world_of
from tlcm_jax.config.build import stage_spec
from tlcm_jax.config.sample_scores import local_rows, sample_scores
from tlcm_jax.config.schema import StageSettings
from tlcm_jax.distillation.lcd import LCDSettings
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.distillation.terms.reward import Reward, Rewarded, RewardedSettings, RewardSettings
from tlcm_jax.evaluation.scorers.function import FunctionScorer
from tlcm_jax.training.mesh import batch_sharding, make_mesh, shard_batch
from tlcm_jax.training.stage import Stage

PROMPTS, STATES = 64, 2


@pytest.fixture(scope="module")
def world():
    return world_of("eps", 3)


def all_bright(images, prompts):
    """A parser's kind of verdict: 1 where the lower row is brighter than half, else 0."""
    assert images.dtype == np.uint8 and images.shape[1:] == (2, 2, 3)
    assert len(prompts) == len(images)
    return np.all(images[:, 1] > 127, axis=(1, 2))


def decode(frozen):
    return lambda z: jnp.repeat((1 + jnp.tanh(z)) / 2, 3, axis=-1)


def loss_of(world, function=all_bright):
    """Stage 2 with a little consistency, and the reward."""
    networks = dataclasses.replace(world.networks, decode=decode)
    settings = LCDSettings(
        guidance_scale=1.0, teacher_substeps=1, states="visited", states_per_rollout=STATES,
        weight=0.1,
    )  # fmt: skip
    term = Reward(
        weight=1.0,
        settings=RewardSettings(scorers={"bright": RewardedSettings(scorer="some.plugin")}),
        networks=networks,
        rewarded={"bright": Rewarded(FunctionScorer("bright", function), "bright", 1.0, 1.0)},
        image_shape=(2, 2, 3),
    )
    return StageLoss(settings.build(networks), {"reward": term})


def stage_of(world, mesh, steps, function=all_bright):
    loss = loss_of(world, function)
    batch = {
        "conditioning": world.conditioning(PROMPTS),
        "inputs": loss.prompt_inputs([f"prompt {i}" for i in range(PROMPTS)]),
    }
    settings = StageSettings(
        objective="lcd", steps=steps, batch_size=PROMPTS * STATES // 2, prompts_per_refill=PROMPTS,
        learning_rate=0.05,
    )  # fmt: skip
    spec = stage_spec("one", settings, loss, mesh, lambda r: shard_batch(mesh, batch), world.frozen)
    return Stage(spec, mesh)


def run(world, mesh, steps, function=all_bright):
    """The scores of its steps, and the parameters that it ends with."""
    stage = stage_of(world, mesh, steps, function)
    state = stage.spec.create_state(world.trainable(), jax.random.key(0))
    scores = []
    for step in range(steps):
        pairs = stage.stream.next(step, state, world.frozen)
        state, metrics = stage.step(state, world.frozen, pairs)
        assert bool(metrics["finite"])
        scores.append(float(metrics["reward/bright/score"]))
    return np.array(scores), jax.tree.map(np.asarray, state.student.params)


def test_a_verdict_without_a_gradient_becomes_likelier_once_a_refill_is_scored(world):
    asked = []

    def counted(images, prompts):
        asked.append(list(prompts))
        return all_bright(images, prompts)

    mesh = make_mesh({"data": 4, "fsdp": 2})
    scores, _ = run(world, mesh, 60, counted)
    print(np.round(scores, 2))
    assert scores[:4].mean() < 0.4 and scores[-4:].mean() > 0.7
    # Once when it was tried, then each refill's samples with their own prompts, once for 2 steps.
    assert [len(each) for each in asked] == [1] + [PROMPTS] * 30
    assert asked[1] == [f"prompt {i}" for i in range(PROMPTS)]


def test_the_mesh_changes_nothing(world):
    """Which rows are scored where, and how many images are decoded at once."""
    found = [run(world, make_mesh(axes, jax.devices()[:count]), 4)
             for axes, count in (({"data": 1}, 1), ({"data": 4, "fsdp": 2}, 8))]  # fmt: skip
    np.testing.assert_array_equal(found[0][0], found[1][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(x[1] for x in found))


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_every_pair_has_the_score_of_its_own_sample(world, rows):
    mesh = make_mesh({"data": 8})
    loss = loss_of(world, lambda images, prompts: images[:, 0, 0, 0])
    pairs = jax.jit(loss.objective.sample_pairs, out_shardings=batch_sharding(mesh))(
        world.trainable(), world.frozen, world.batch(PROMPTS), keys(0, PROMPTS)
    )
    inputs = loss.prompt_inputs([f"prompt {i // STATES}" for i in range(PROMPTS * STATES)])
    pairs = pairs._replace(inputs=shard_batch(mesh, inputs))
    found = sample_scores(loss, mesh, rows)(world.frozen, pairs)
    expected = np.round(255 * np.asarray(decode({})(pairs.sample)))[:, 0, 0, 0]
    np.testing.assert_array_equal(found.inputs["reward"]["scores"]["bright"], expected)
    np.testing.assert_array_equal(local_rows(found.z_m), pairs.z_m)
    weight = np.asarray(found.inputs["reward"]["advantage"])
    np.testing.assert_allclose((weight.mean(), weight.std()), (0, 1), atol=1e-5)
    assert sample_scores(StageLoss(loss.objective), mesh, rows) is None
