"""Reward against closed forms: the policy gradient of the student's own sampler, and its zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gaussian_world import keys
from tests.support.roles import outputs_of
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.lcd import LCDSettings, visited
from tlcm_jax.distillation.objective import split
from tlcm_jax.distillation.terms import reward
from tlcm_jax.distillation.terms.base import Context
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.distillation.terms.reward import (
    Reward,
    Rewarded,
    RewardedSettings,
    RewardSettings,
    from_bytes,
    to_bytes,
)
from tlcm_jax.evaluation.scorers.function import FunctionScorer

TIMES = (999, 749, 499, 249)
RED = FunctionScorer("red", lambda images, prompts: images[..., 0].mean(axis=(1, 2)) / 255)
LONG = FunctionScorer("long", lambda images, prompts: np.array([len(p) for p in prompts]))


def term_of(world, held_out=None, **followed):
    """Scorers by name, each with its weight."""
    rewarded = {
        name: Rewarded(scorer, scorer.name, 1.0, weight)
        for name, (scorer, weight) in followed.items()
    }
    if held_out is not None:
        rewarded["held_out"] = Rewarded(held_out, held_out.name, 1.0, 0.0)
    return Reward(
        weight=1.0,
        settings=RewardSettings(scorers={"red": RewardedSettings(scorer="some.plugin")}),
        networks=world.networks,
        rewarded=rewarded,
        image_shape=(8, 8, 3),
    )


def balanced(size):
    """Noise whose mean is 0, whose covariance is 1 and whose third moments are 0, exactly."""
    return np.sqrt(size) * np.concatenate([np.eye(size), -np.eye(size)]).astype(np.float32)


# The Gaussian student: it predicts x whatever it sees, and ends at g z_s + h.
ALPHA, SIGMA, G = 0.6, 0.8, np.array([0.5, -1.5, 2.0], np.float32)
H, GOAL = np.array([0.1, 0.2, -0.3], np.float32), np.array([1.0, -0.5, 0.2], np.float32)
V = np.array([0.3, 1.0, -2.0], np.float32)


def slope(x, reward_of):
    """The mean gradient of (2) in x, over samples that the student drew at x."""
    states = ALPHA * x + SIGMA * balanced(3)
    scores = reward_of(G * states + H)
    weight = scores - jnp.mean(scores)
    levels = jnp.full((2, 6), jnp.array([[ALPHA], [SIGMA]]))

    def total(x):
        each = jnp.broadcast_to(x, states.shape)
        return jnp.mean(
            losses.reward_weighted(each, jax.lax.stop_gradient(states), *levels, weight)
        )

    return jax.grad(total)(x)


def test_the_gradient_is_that_of_the_expected_reward():
    """Of a linear one, E[R] = v (g (alpha x + sigma e) + h): its slope is alpha g v."""
    x = jnp.array([0.2, -0.4, 0.7])
    found = slope(x, lambda ends: ends @ V)
    np.testing.assert_allclose(found, -ALPHA * G * V / 3, rtol=1e-5)
    # Of the nearness to a goal: twice the distance that is left, through g.
    left = GOAL - (G * ALPHA * x + H)
    found = slope(x, lambda ends: -jnp.sum(jnp.square(ends - GOAL), axis=1))
    np.testing.assert_allclose(found, -2 * ALPHA * G * left / 3, rtol=1e-4)


def test_what_it_comes_to_is_the_best_mean():
    """Where nearness to a goal is the reward, the student's samples end with their mean there."""
    descend = jax.jit(lambda x: x - slope(x, lambda e: -jnp.sum(jnp.square(e - GOAL), axis=1)))
    x = jnp.zeros(3)
    for _ in range(400):
        x = descend(x)
    np.testing.assert_allclose(G * ALPHA * x + H, GOAL, atol=1e-5)
    np.testing.assert_allclose(slope(x, lambda ends: -jnp.sum((ends - GOAL) ** 2, 1)), 0, atol=1e-5)


def test_scores_that_are_all_alike_ask_for_nothing():
    np.testing.assert_array_equal(losses.standardised(jnp.full(5, 0.1)), 0)
    np.testing.assert_array_equal(losses.standardised(jnp.zeros(5)), 0)


def test_scores_are_weighed_in_units_of_their_own(world):
    a, b = jnp.array([1.0, 2.0, 6.0]), jnp.array([700.0, 100.0, 100.0])
    term = term_of(world, red=(RED, 2.0), long=(LONG, 0.5), held_out=RED)
    found = term.weigh({"red": a, "long": b, "held_out": b})
    expected = 2 * (a - 3) / np.std(a) + 0.5 * (b - 300) / np.std(b)
    np.testing.assert_allclose(found["advantage"], expected, rtol=1e-6)
    alone = [
        term_of(world, red=(RED, 2.0)).weigh({"red": a})["advantage"],
        term_of(world, long=(LONG, 0.5)).weigh({"long": b})["advantage"],
    ]
    np.testing.assert_allclose(found["advantage"], sum(alone), rtol=1e-6)
    np.testing.assert_array_equal(found["scores"]["held_out"], b)


def test_the_host_scores_images_with_their_own_prompts(world):
    term = term_of(world, red=(RED, 1.0), held_out=LONG)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1, ..., 0] = 255
    found = term.score_samples(images, term.prompt_inputs(["eine Rübe", "红"]))
    np.testing.assert_array_equal(found["red"], [0, 1])
    np.testing.assert_array_equal(found["held_out"], [9, 1])


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1))
def test_prompts_come_back_from_a_batch(texts):
    assert from_bytes(to_bytes(texts)) == texts


def rollouts(world, size):
    """Stage 2 without a consistency loss, asked at every state of its own sampler."""
    settings = LCDSettings(
        guidance_scale=2.0, states="visited", states_per_rollout=len(TIMES), weight=0.0
    )
    objective = settings.build(world.networks)
    # What it draws on the way shows in the end: half of its variance and more.
    zeros = world.trainable()
    theta = {"gain": zeros["gain"] + 1.0, "bias": zeros["bias"] + 0.1}
    return objective, theta, world.pairs(objective, size, trainable=theta)


def test_the_stage_s_gradient_is_that_of_its_sampler_s_expected_reward(any_world):
    """Against differentiation through the sampler itself, on the same noise.

    What the last step says is no part of it: that step draws nothing.
    """
    world, size = any_world, 40000
    objective, theta, pairs = rollouts(world, size)
    like = jnp.asarray([0.5, -1.0, 2.0, 0.3]).reshape(world.shape)

    def linear(x):
        return jnp.sum((like * x).reshape(len(x), -1), axis=1)

    noise_keys, rollout_keys, *_ = split(keys(0, size), 4)

    def expected(theta):
        student = world.student(theta, world.frozen)
        path = visited(
            student, world.process, normal(noise_keys, world.shape), world.conditioning(size),
            TIMES, rollout_keys,
        )  # fmt: skip
        return jnp.mean(linear(path[:, -1]))

    term = term_of(world, red=(RED, 1.0))
    scores = linear(pairs.sample)
    inputs = {"reward": jax.jit(term.weigh)({"red": scores})}
    loss = StageLoss(objective, {"reward": term})

    def total(theta):
        own = keys(1, len(scores))
        return jnp.mean(loss(theta, world.frozen, pairs._replace(inputs=inputs), own, {})[0])

    wanted, found = jax.jit(jax.grad(expected))(theta), jax.jit(jax.grad(total))(theta)
    # The mean over elements and over the states of a rollout, and the deviation.
    scale = -np.std(scores) * 4 * len(TIMES)
    # Each of the times is the upper end of a segment: 8, 6, 4, and 2 for the last.
    error, size = 0.0, 0.0
    for name in ("gain", "bias"):
        by_segment = scale * np.asarray(found[name])
        np.testing.assert_array_equal(by_segment[1], 0)
        assert np.any(wanted[name][1] != 0)
        error += np.sum(np.square(by_segment[3:] - wanted[name][3:]))
        size += np.sum(np.square(wanted[name][3:]))
    print(np.sqrt(error / size))
    assert error < 0.05**2 * size


def test_the_last_step_and_its_metrics(world):
    term = term_of(world, red=(RED, 1.0), held_out=LONG)
    x0 = jax.random.normal(jax.random.key(0), (3, *world.shape))
    outputs = outputs_of(world, x0)._replace(
        next_state=x0 + 1, next_time=jnp.array([499, 249, world.process.end])
    )
    scores = {"red": jnp.array([1.0, 2.0, 3.0]), "held_out": jnp.arange(3.0)}
    context = Context(world.frozen, {}, jax.jit(term.weigh)(scores), {}, keys(0, 3))
    value, metrics = term.loss(outputs, context)
    assert value[0] < 0 and value[2] == 0  # worst, and last
    assert set(metrics) == {"red/score", "held_out"}
    np.testing.assert_array_equal(metrics["red/score"], scores["red"])


def test_it_needs_the_sampler_s_own_states(world):
    term = term_of(world, red=(RED, 1.0))
    with pytest.raises(ValueError, match="take the objective 'lcd' with states = 'visited'"):
        StageLoss(LCDSettings().build(world.networks), {"reward": term})


# What cannot be followed is said before anything is compiled.


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images, "its function must return 1 numbers"),
        (lambda images, prompts: ["good"], "its function must return 1 numbers"),
        (lambda images, prompts: [np.nan], "gives an image a score that is no number"),
    ],
)
def test_a_function_that_gives_no_numbers_is_refused(world, function, message):
    term = term_of(world, odd=(FunctionScorer("odd", function), 1.0))
    with pytest.raises(ValueError, match=message):
        term.prompt_inputs(["a cat"])


def test_the_parser_refuses_prompts_of_another_world_and_images_of_another_size(world):
    rewarded = {"parser": reward.load_rewarded("miniature.shapes.scorer", "r1", weight=1.0)}
    assert rewarded["parser"].measure == "all_checks"
    term = dataclasses.replace(term_of(world), rewarded=rewarded)
    with pytest.raises(ValueError, match="cat"):
        term.prompt_inputs(["a cat"])
    with pytest.raises(ValueError, match="an image of \\(8, 8, 3\\); the parser reads"):
        term.prompt_inputs(["a red circle"])
    fits = dataclasses.replace(term, image_shape=(64, 64, 3))
    scores = fits.score_samples(
        np.zeros((1, 64, 64, 3), np.uint8), {"prompts": to_bytes(["a red circle"])}
    )
    np.testing.assert_array_equal(scores["parser"], 0)


def test_of_a_measure_that_is_to_be_small_the_negative_is_followed():
    chosen = reward.load_rewarded("miniature.shapes.scorer", "r1", "malformed")
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    np.testing.assert_array_equal(chosen.scores(images, ["a red circle"] * 2), [-1, -1])
    unknown = reward.load_rewarded("miniature.shapes.scorer", "r1", "beauty")
    with pytest.raises(ValueError, match="no 'beauty' of a single image: .* all_checks, malformed"):
        unknown.scores(images, ["a red circle"] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorers": {}}, "scorers: none has a weight above 0"),
        ({"weight": -1.0}, "weight = -1.0: must be at least 0"),
        ({"scorers": {"held_out": RewardedSettings()}}, "is the held-out reward's name"),
        ({"held_out": "a", "held_out_weights": "b"}, "scorer 'a' cannot be its own check"),
        ({"stop_on_reward_hacking": True}, "needs a held_out scorer"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RewardSettings(**{"scorers": {"a": RewardedSettings(weights="b")}, **changes})


def test_two_measures_of_one_scorer_are_two():
    one = RewardedSettings(scorer="a")
    both = {"one": one, "other": dataclasses.replace(one, measure="malformed")}
    assert RewardSettings(scorers=both).scorers == both
    with pytest.raises(ValueError, match="'other' is 'one' again"):
        RewardSettings(scorers={"one": one, "other": one})
