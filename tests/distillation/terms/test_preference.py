"""Preference by hand, and when a stage ends because scorer and held-out reward part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import roles
from tests.support.roles import TOY, WISH, context_of, outputs_of, preference
from tlcm_jax.distillation.terms import scored
from tlcm_jax.distillation.terms.compose import value_and_grad_at


def at(world, term, x, texts):
    """The term's value, gradient and metrics at predictions x with prompts `texts`."""
    inputs = jax.tree.map(jnp.asarray, term.prompt_inputs([str(text) for text in texts]))

    def loss(x):
        return term.loss(outputs_of(world, x), context_of(world, term, len(x), inputs))

    return value_and_grad_at(loss, x)


def test_the_preference_loss_by_hand(any_world):
    world = any_world
    term = preference(world)
    x = jax.random.normal(jax.random.key(0), (3, *world.shape))
    texts = np.array([0.2, 0.4, 0.4])
    value, _, metrics = at(world, term, x, texts)
    images = np.tanh(np.asarray(x)).reshape(3, -1)

    def score(sign, text):
        return 10 - np.mean((images - sign * text[:, None]) ** 2, axis=1)

    own, other = score(1.0, texts), score(1.0, np.roll(texts, 1))
    expected = np.maximum(9.9 - own, 0) + np.maximum(other, 0) * [1, 1, 0]  # 3's other is its own
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["toy/score"], own, rtol=1e-5)
    np.testing.assert_allclose(metrics["toy/loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["held_out"], score(-1.0, texts), rtol=1e-5)
    assert (term.weight, term.max_grad_ratio) == (1.0, 0.3)


def wish(**changes):
    """The default's one scorer with other choices."""
    return dataclasses.replace(WISH, scorers={"toy": dataclasses.replace(TOY, **changes)})


def test_a_stage_s_own_threshold_takes_the_scorer_s_place(world):
    def value(settings):
        return at(world, preference(world, settings), jnp.zeros((2, *world.shape)), [0.2, 0.4])[0]

    # Grey images score above 9.8, so the scorer's 9.9 asks for at most 0.1 more.
    own, other = value(WISH), value(wish(threshold=20.0))
    score = 10 - np.array([0.2, 0.4]) ** 2
    np.testing.assert_allclose(other - own, 20 - score - np.maximum(9.9 - score, 0), rtol=1e-5)


def test_several_scorers_are_followed_as_their_weighted_sum(any_world):
    """Value and gradient, each scorer with a weight and a threshold of its own."""
    world = any_world
    x = jax.random.normal(jax.random.key(0), (3, *world.shape))
    bright = dataclasses.replace(TOY, threshold=20.0, weight=0.3)
    dark = dataclasses.replace(TOY, weights="-0.5", threshold=9.95, weight=2.0)

    def found(**scorers):
        settings = dataclasses.replace(WISH, scorers=scorers)
        return at(world, preference(world, settings), x, [0.2, 0.4, 0.6])

    both = found(bright=bright, dark=dark, none=dataclasses.replace(TOY, weight=0.0))
    ones = {"bright": found(bright=bright), "dark": found(dark=dark)}
    for part in (0, 1):
        expected = ones["bright"][part] + ones["dark"][part]
        np.testing.assert_allclose(both[part], expected, rtol=1e-5, atol=1e-7)
    for key, weight in (("bright", 0.3), ("dark", 2.0)):
        value, gradient, metrics = ones[key]
        np.testing.assert_allclose(value, weight * metrics[f"{key}/loss"], rtol=1e-6)
        plain = found(**{key: dataclasses.replace({"bright": bright, "dark": dark}[key], weight=1)})
        np.testing.assert_allclose(gradient, weight * plain[1], rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(both[2][f"{key}/score"], metrics[f"{key}/score"])
        assert np.any(gradient != 0)
    assert "none/score" not in both[2]


def test_a_scorer_without_a_threshold_needs_one(world, monkeypatch):
    monkeypatch.setattr(roles, "load", lambda path: roles.ToyScorer(threshold=None))
    with pytest.raises(ValueError, match="of its own: set preference.scorers.toy.threshold"):
        preference(world)
    assert preference(world, wish(threshold=1.0)).liked["toy"].threshold == 1.0


def test_a_scorer_that_cannot_be_followed_is_refused_and_can_be_held_out(world, monkeypatch):
    def load(path):
        return roles.ToyScorer(differentiable=path == "1")

    monkeypatch.setattr(roles, "load", load)
    assert preference(world).held_out is not None
    with pytest.raises(ValueError, match="has no gradient in the images.*a `reward` term"):
        preference(world, wish(weights="2"))


def test_a_scorer_of_the_host_is_no_held_out_reward_of_the_device(world):
    settings = dataclasses.replace(WISH, held_out="miniature.shapes.scorer", held_out_weights="")
    with pytest.raises(ValueError, match="'miniature.shapes.scorer' scores on the host"):
        preference(world, settings)


def test_without_a_decoder_it_says_so(world):
    term = dataclasses.replace(preference(world), networks=world.networks)
    with pytest.raises(ValueError, match="preference needs a decoder, and the model has none"):
        at(world, term, jnp.zeros((2, *world.shape)), [0.2, 0.4])


def test_the_held_out_reward_is_told_and_not_followed(world):
    """Its gradient at x is nobody's, and without one there is none to tell."""
    x = jax.random.normal(jax.random.key(0), (3, *world.shape))
    alone = dataclasses.replace(WISH, held_out="", held_out_weights="")
    both, one = (at(world, preference(world, s), x, [0.2, 0.4, 0.6]) for s in (WISH, alone))
    np.testing.assert_array_equal(both[1], one[1])
    assert "held_out" in both[2] and "held_out" not in one[2]


def test_descent_on_the_term_raises_its_score(world):
    term = preference(world)
    x = jax.random.normal(jax.random.key(0), (16, *world.shape))

    @jax.jit
    def descend(x):
        _, gradient, metrics = at(world, term, x, [0.5] * 16)
        return x - 0.5 * gradient, jnp.mean(metrics["toy/score"])

    scores = []
    for _ in range(50):
        x, score = descend(x)
        scores.append(float(score))
    assert scores[-1] > 9.85 > scores[0] + 0.1


def test_a_stage_ends_when_scorer_and_held_out_reward_part(world):
    settings = dataclasses.replace(WISH, stop_on_reward_hacking=True, tolerance=0.5)

    def rows(score, held_out):
        columns = zip(score, held_out, strict=True)
        return [{"wish/toy/score": s, "wish/held_out": h} for s, h in columns]

    rise, fall, drift = np.linspace(0, 2, 12), np.linspace(0, -2, 12), np.linspace(0, -0.4, 12)
    term = preference(world, settings)

    def stop(score, held_out, term=term, count=12):
        return term.should_stop(rows(score, held_out)[:count], "wish")

    assert "the held-out reward fell by 1.27 while 'toy' rose by 1.27" in stop(rise, fall)
    assert stop(rise, rise) == stop(fall, fall) == stop(rise, drift) == ""
    assert stop(rise, fall, count=9) == ""  # too early to say
    assert stop(rise, fall, term=preference(world)) == ""


def test_one_scorer_that_rises_of_several_is_enough_to_end_a_stage():
    rise, fall = np.linspace(0, 2, 12), np.linspace(0, -2, 12)
    rows = [
        {"wish/a/score": b, "wish/b/score": a, "wish/held_out": b}
        for a, b in zip(rise, fall, strict=True)
    ]
    assert "while 'b' rose" in scored.reward_hacking(rows, "wish", ("a", "b"), 0.0)
    assert scored.reward_hacking(rows, "wish", ("a",), 0.0) == ""
