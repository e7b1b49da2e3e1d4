"""Scorers that preference follows: the small contrastive one, and what cannot be followed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.evaluation.scorers import rewards, scorers
from tlcm_jax.evaluation.scorers.contrastive import (
    LENGTH,
    ContrastiveNetwork,
    ContrastiveReward,
    words,
)


@pytest.fixture(scope="module")
def reward():
    network = ContrastiveNetwork(widths=(8,), features=8, resolution=8)
    blank = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(network.init)(jax.random.key(0), blank, words(["a"]))["params"]
    params["words"]["embedding"] = params["words"]["embedding"] * 10
    return ContrastiveReward(network, params, 16.0)


def test_a_score_is_a_hundred_times_a_cosine(reward):
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))
    texts = reward.texts(["a red cat", "a red  CAT!", "an icon"])
    found = reward.score(reward.params, images[:1].repeat(3, 0), texts)
    assert np.all(np.abs(found) <= 100)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)  # the same words
    assert abs(float(found[0] - found[2])) > 1e-3
    larger = jax.image.resize(images, (3, 16, 16, 3), "nearest")
    assert reward.score(reward.params, larger, texts).shape == (3,)


def test_words_are_rows_that_every_process_agrees_on():
    table = words(["a red cat", "", "w " * 40])
    assert table.shape == (3, LENGTH) and table.dtype == np.int32
    assert not table[1].any() and table[2].all() and len(set(table[0, :3])) == 3
    assert table[0, 0] == 1 + 3904355907 % 8191  # zlib.crc32(b"a")


def test_what_is_saved_is_what_is_loaded(reward, tmp_path):
    reward.save(tmp_path)
    loaded = rewards.load_reward("contrastive", str(tmp_path))
    images, texts = jnp.full((1, 8, 8, 3), 0.3), reward.texts(["a cat"])
    found = loaded.score(loaded.params, images, texts)
    np.testing.assert_allclose(found, reward.score(reward.params, images, texts), atol=0.2)  # fp16
    assert loaded.threshold == 16.0
    (tmp_path / "scorer.json").unlink()
    with pytest.raises(FileNotFoundError, match="scorer.json is missing; train one with"):
        rewards.load_reward("contrastive", str(tmp_path))


def test_a_scorer_with_no_gradient_is_refused(reward, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Rounded:
        params = None
        threshold = 0.0
        how: object

        def texts(self, prompts):
            return np.zeros((len(prompts), 1))

        def score(self, params, images, texts):
            return self.how(images)

    def rounding(images):
        return jnp.round(jnp.mean(images, axis=(1, 2, 3)))

    def outside(images):
        shape = jax.ShapeDtypeStruct((len(images),), jnp.float32)
        return jax.pure_callback(lambda x: np.zeros(len(x), np.float32), shape, images)

    for how, message in ((rounding, "has no gradient"), (outside, "cannot be differentiated")):
        monkeypatch.setattr(rewards, "REWARDS", {"odd": lambda folder, how=how: Rounded(how)})
        with pytest.raises(ValueError, match=f"scorer 'odd' {message}"):
            rewards.load_reward("odd", "")
        assert rewards.load_reward("odd", "", followed=False)  # it can be the judge
    with pytest.raises(ValueError, match="unknown scorer 'clip'; known: odd"):
        rewards.load_reward("clip", "")


def test_a_reward_can_be_told_in_an_evaluation(reward, tmp_path):
    reward.save(tmp_path)
    (told,) = scorers.load_scorers({"contrastive": tmp_path})
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (5, 8, 8, 3), np.uint8)
    prompts = ["a cat", "a dog", "an icon", "red", "a sun"]
    told.check(prompts, {})
    assert [measure.key for measure in told.measures] == ["contrastive"]
    by_hand = told.reward.score(
        told.reward.params, pictures.astype(np.float32) / 255, reward.texts(prompts)
    )
    found = told.score(pictures, prompts, {})
    assert found == {"contrastive": pytest.approx(float(np.mean(by_hand)), abs=1e-3)}
    for batch in (2, 5, 7):
        assert rewards.mean_score(told.reward, pictures, prompts, batch) == pytest.approx(
            found["contrastive"], abs=1e-3
        )
    assert told.ceiling("heldout", 5) == {}
