"""The judge: its file format, what it refuses, and the committed one on real pictures."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from miniature.judge import DESCRIPTION, WEIGHTS, Judge
from miniature.judge_network import JudgeNetwork
from tlcm_jax.evaluation.scorers import frechet
from tlcm_jax.evaluation.scorers.frechet import Moments

ROOT = pathlib.Path(__file__).parents[2]
LABELS, STYLES = ("apple", "pear", "plum", "fig", "kiwi", "lime"), ("flat", "round")


def _weights(random, leaf, shape):
    """Random weights that keep a signal's size; statistics as of an untrained normalisation."""
    if leaf in ("scale", "running_var"):
        return np.ones(shape, np.float32)
    fan = np.prod(shape[:-1]) if leaf == "kernel" else 1
    return (random.normal(size=shape) * np.sqrt(2 / fan)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    """An untrained judge of six objects, with eight Frechet dimensions."""
    network = JudgeNetwork(classes=6, styles=2, side=32, width=16)
    random = np.random.default_rng(0)
    pictures = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), pictures)["params"]
    return Judge(
        network=network,
        params=jax.tree_util.tree_map_with_path(
            lambda path, x: _weights(random, str(path[-1].key), x.shape), shapes
        ),
        labels=LABELS,
        styles=STYLES,
        resolution=32,
        centre=random.normal(size=1280),
        projection=random.normal(size=(1280, 8)),
        moments={"train": Moments.of(random.normal(size=(90, 8)))},
        floors={"train": ((10, 1.0), (20, 0.5), (40, 0.25))},
        real={"train": {"count": 90, "object_top1": 0.75, "object_top5": 1.0, "style": 0.5}},
    )


@pytest.fixture
def images():
    return np.random.default_rng(1).uniform(size=(70, 32, 32, 3)).astype(np.float32)


def test_a_saved_judge_loads_as_itself(small, images, tmp_path):
    small.save(tmp_path)
    loaded = Judge.load(tmp_path)
    assert (loaded.labels, loaded.styles, loaded.floors) == (LABELS, STYLES, small.floors)
    assert loaded.real == small.real and loaded.network == small.network
    for before, after in zip(small.judge(images[:4]), loaded.judge(images[:4]), strict=True):
        # fp16 weights: three digits.
        np.testing.assert_allclose(after, before, atol=5e-3 * np.abs(before).max())
    np.testing.assert_allclose(
        loaded.moments["train"].covariance, small.moments["train"].covariance, rtol=1e-5, atol=1e-6
    )


def test_a_picture_is_judged_alike_in_any_batch_and_every_time(small, images):
    together = small.judge(images)  # 70: one whole batch and a padded one
    again = small.judge(images)
    alone = small.judge(images[66:67])
    for all_of_them, repeated, one in zip(together, again, alone, strict=True):
        assert len(all_of_them) == 70
        np.testing.assert_array_equal(all_of_them, repeated)
        # The projection is a matrix product in float64, whose order follows the batch's size.
        np.testing.assert_allclose(all_of_them[66:67], one, rtol=1e-10, atol=1e-10)


def test_ranks_count_the_objects_that_score_higher(small, images):
    _, objects, styles = small.judge(images[:6])
    order = np.argsort(-objects, 1)
    asked = [LABELS[order[i, i]] for i in range(6)]  # picture i: the object of rank i
    asked_style = [STYLES[k] for k in styles.argmax(1)]
    asked_style[2] = STYLES[1 - STYLES.index(asked_style[2])]
    verdicts = small.score(images[:6], asked, asked_style)
    np.testing.assert_array_equal(verdicts["object_rank"], range(6))
    np.testing.assert_array_equal(verdicts["object_top1"], np.arange(6) == 0)
    np.testing.assert_array_equal(verdicts["object_top5"], np.arange(6) < 5)
    np.testing.assert_array_equal(verdicts["style"], np.arange(6) != 2)


def test_a_report_holds_the_scores_of_real_pictures_beside_its_own(small, images):
    report = small.report(images, ["pear"] * 70, ["flat"] * 70)
    verdicts = small.score(images, ["pear"] * 70, ["flat"] * 70)
    assert report["object_top1"] == verdicts["object_top1"].mean()
    assert report["style"] == verdicts["style"].mean()
    moments = Moments.of(small.features(images))
    assert report["frechet"] == frechet.distance(moments, small.moments["train"])
    assert report["real"] == small.real["train"]
    assert small.floor(20) == 0.5
    assert 0.5 < small.floor(15) < 1.0
    assert small.floor(400) == report["frechet_floor"] == 0.25
    with pytest.raises(ValueError, match="unknown split 'test': choose one of train"):
        small.report(images, ["pear"] * 70, ["flat"] * 70, split="test")


def test_pictures_of_another_size_are_brought_to_the_trained_one(small, images):
    large = images[:3].repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(
        small.judge(large)[0],
        small.judge(np.asarray(jax.image.resize(large, (3, 32, 32, 3), "bilinear")))[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_cannot_be_judged_says_why(small, images):
    with pytest.raises(ValueError, match="divide by 255"):
        small.features((images * 255).astype(np.uint8))
    with pytest.raises(ValueError, match="0 to 1"):
        small.features(images * 2 - 1)
    with pytest.raises(ValueError, match="0 to 1"):
        small.features(images * np.nan)
    with pytest.raises(ValueError, match=r"\[n, h, w, 3\]"):
        small.features(images[0])
    with pytest.raises(ValueError, match="no object label 'cherry'"):
        small.score(images[:1], ["cherry"], ["flat"])
    with pytest.raises(ValueError, match="2 pictures need 2 styles, not 1"):
        small.score(images[:2], ["fig", "fig"], ["flat"])


def test_a_broken_folder_says_what_is_wrong(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{DESCRIPTION} is missing; train one with"):
        Judge.load(tmp_path)
    small.save(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="damaged"):
        Judge.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is missing"):
        Judge.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights)
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**described, "labels": ["apple"]}))
    with pytest.raises(ValueError, match="do not belong together"):
        Judge.load(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps({**described, "format": 0}))
    with pytest.raises(ValueError, match="not a judge of format 1"):
        Judge.load(tmp_path)


def test_the_committed_judge_knows_real_pictures():
    judge = Judge.load(ROOT / "miniature" / "judge")
    fixtures = json.loads((ROOT / "tests" / "fixtures" / "emoji.json").read_text())["pictures"]
    images = np.stack(
        [
            np.asarray(Image.open(ROOT / "tests" / "fixtures" / picture["file"]), np.float32) / 255
            for picture in fixtures
        ]
    )
    verdicts = judge.score(images, [p["label"] for p in fixtures], [p["style"] for p in fixtures])
    # It is right about 96 of 100 objects; here it takes the snowman for the one without snow.
    assert verdicts["object_top1"].sum() >= 7 and verdicts["object_top5"].all()
    assert verdicts["style"].sum() >= 7
    swapped = judge.score(
        images, [p["label"] for p in fixtures[::-1]], [p["style"] for p in fixtures]
    )
    assert not swapped["object_top5"].any()
    assert set(judge.moments) == {"train", "heldout", "composition"}
    # Noise is no emoji: far beyond what real pictures of that number score.
    noise = np.random.default_rng(0).uniform(size=(256, 32, 32, 3)).astype(np.float32)
    distance = frechet.distance(Moments.of(judge.features(noise)), judge.moments["train"])
    assert distance > 10 * judge.floor(256)


def test_the_committed_judge_is_small():
    folder = ROOT / "miniature" / "judge"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
