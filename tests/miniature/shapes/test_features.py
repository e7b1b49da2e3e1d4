"""Frechet distance, precision and recall on the small network's features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniature.shapes.features import WEIGHTS, FeatureNetwork, load, read_features, save
from miniature.shapes.scene import RUNGS, TEST_START, draw_scene, draw_spec
from miniature.shapes.scorer import reals
from miniature.shapes.train_features import answering, batches, questions
from tlcm_jax.evaluation.scorers.table import load_scorer


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("miniature.shapes.features")


def captions(rung: str, count: int) -> tuple[list, list[str]]:
    from miniature.shapes.captions import english

    specs = [draw_spec(TEST_START + i, RUNGS[rung]) for i in range(count)]
    return specs, [english(spec) for spec in specs]


def test_real_renders_are_near_and_ruined_ones_are_not(scorer):
    specs, prompts = (each[:30] * 2 for each in captions("r1", 30))
    scorer.check(prompts, {})
    images = reals(specs, RUNGS["r1"])
    found = scorer.summarise(scorer.values(images, prompts, {}))
    noise = np.random.default_rng(0).normal(0, 25, images.shape)
    ruined = np.clip(images + noise, 0, 255).astype(np.uint8)
    worse = scorer.summarise(scorer.values(ruined, prompts, {}))
    assert found["frechet"] < worse["frechet"] and found["precision"] > worse["precision"]
    # One picture over and over: precise, and nearly nothing is covered.
    same = scorer.summarise(scorer.values(images[:1].repeat(60, 0), prompts, {}))
    assert same["recall"] < 0.2 < found["recall"]
    assert same["diversity"] == pytest.approx(0, abs=1e-4) and 0.7 < found["diversity"] < 1.4


def test_the_row_of_real_renders_is_of_as_many(scorer):
    found = scorer.real_data_score("test", 24)
    assert set(found) == {measure.key for measure in scorer.measures}
    assert found == scorer.real_data_score("test", 24) != scorer.real_data_score("test", 25)
    assert scorer.real_data_score("another file", 24) == {}


def test_features_do_not_depend_on_the_batch(scorer):
    images = reals(captions("r3", 7)[0], RUNGS["r3"])
    whole = scorer.features(images)
    parts = np.concatenate([scorer.features(images[:2]), scorer.features(images[2:])])
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_score_is_refused(scorer, tmp_path):
    with pytest.raises(ValueError, match="give at least 4 prompts"):
        scorer.check(["a star"], {})
    with pytest.raises(ValueError, match="a photograph"):
        scorer.check(["a photograph"] * 4, {})
    with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
        scorer.values(np.zeros((4, 32, 32, 3), np.uint8), ["a star"] * 4, {})
    with pytest.raises(ValueError, match="give one of r1, r2, r3, full"):
        load("r9")
    with pytest.raises(FileNotFoundError, match="train it with"):
        read_features(tmp_path / "none.safetensors", RUNGS["r1"])


def test_what_is_saved_is_what_is_read(scorer, tmp_path):
    save(scorer.params, tmp_path / WEIGHTS.name)
    again = read_features(tmp_path / WEIGHTS.name, scorer.rung)
    jax.tree.map(np.testing.assert_array_equal, again.params, dict(scorer.params))


def test_the_answers_of_a_scene_and_their_loss():
    scene = draw_scene(draw_spec(0, RUNGS["r1"]), 0, RUNGS["r1"])
    answers = questions(scene)
    # One shape, colour, size, contrast, fill, cell, style and ground; no second object.
    assert answers.sum() == 8
    batch = next(batches(0, 4))
    assert batch["answers"].shape == (4, len(answers))
    network = FeatureNetwork(answers=len(answers), widths=(8,), features=8)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    loss, told = jax.jit(answering(network))(params, batch, jax.random.key(1))
    assert float(loss) == pytest.approx(len(answers) * np.log(2), rel=1e-5)
    assert float(told["right"]) == pytest.approx(1 - batch["answers"].mean(), abs=1e-6)
