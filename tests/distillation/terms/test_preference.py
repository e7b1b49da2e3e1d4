"""Preference by hand, and when a stage ends because scorer and judge part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.roles import WISH, made_of, roles
from tlcm_jax.distillation.terms.compose import at
from tlcm_jax.distillation.terms.preference import parted, preference


def test_the_preference_loss_by_hand(world):
    networks = roles(world)
    term = preference(networks, world.schedule, WISH)
    x = jax.random.normal(jax.random.key(0), (3, *world.shape))
    texts = jnp.array([0.2, 0.4, 0.4])
    extras = {"reward_texts": texts, "judge_texts": texts}
    value, told = term.loss(made_of(world, x), extras, world.frozen, {}, jax.random.key(0))
    pictures = np.tanh(np.asarray(x))

    def score(target, text):
        return 10 - np.mean(
            (pictures - target * np.asarray(text)[:, None, None, None]) ** 2, (1, 2, 3)
        )

    own, other = score(1.0, texts), score(1.0, np.roll(texts, 1))
    expected = np.maximum(9.9 - own, 0) + np.maximum(other, 0) * [1, 1, 0]  # 3's other is its own
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(told["score"], own, rtol=1e-5)
    np.testing.assert_allclose(told["judge"], score(-1.0, texts), rtol=1e-5)
    assert term.share == 0.3


def test_a_stage_s_own_threshold_takes_the_scorer_s_place(world):
    def value(settings):
        term = preference(roles(world), world.schedule, settings)
        x, texts = jnp.zeros((2, *world.shape)), jnp.array([0.2, 0.4])
        extras = {"reward_texts": texts, "judge_texts": texts}
        return term.loss(made_of(world, x), extras, world.frozen, {}, jax.random.key(0))[0]

    # Grey pictures score above 9.8, so the scorer's 9.9 asks for at most 0.1 more.
    own, other = value(WISH), value(dataclasses.replace(WISH, threshold=20.0))
    score = 10 - np.array([0.2, 0.4]) ** 2
    np.testing.assert_allclose(other - own, 20 - score - np.maximum(9.9 - score, 0), rtol=1e-5)


def test_descent_on_the_term_raises_its_score(world):
    term = preference(roles(world), world.schedule, WISH)
    texts = jnp.full(16, 0.5)
    extras = {"reward_texts": texts, "judge_texts": texts}
    x = jax.random.normal(jax.random.key(0), (16, *world.shape))

    def loss(x):
        return term.loss(made_of(world, x), extras, world.frozen, {}, jax.random.key(0))

    @jax.jit
    def descend(x):
        _, gradient, told = at(loss, x)
        return x - 0.5 * gradient, jnp.mean(told["score"])

    scores = []
    for _ in range(50):
        x, score = descend(x)
        scores.append(float(score))
    assert scores[-1] > 9.85 > scores[0] + 0.1


def test_a_stage_ends_when_scorer_and_judge_part():
    settings = dataclasses.replace(WISH, stop_when_parted=True, tolerance=0.5)

    def rows(score, judge):
        return [
            {"preference/score": s, "preference/judge": j}
            for s, j in zip(score, judge, strict=True)
        ]

    rise, fall, drift = np.linspace(0, 2, 12), np.linspace(0, -2, 12), np.linspace(0, -0.4, 12)
    enough = parted(settings)
    assert "the judge fell by" in enough(rows(rise, fall))
    assert enough(rows(rise, rise)) == enough(rows(fall, fall)) == enough(rows(rise, drift)) == ""
    assert enough(rows(rise, fall)[:9]) == ""  # too early to say
    assert parted(WISH)(rows(rise, fall)) == ""
