"""The scorer of shapes that preference follows: told apart, followed, and trained on what is so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes
from miniature.contrastive import words
from miniature.shapes.captions import english
from miniature.shapes.contrastive import FOLDER, load
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, TEST_START, Group, Spec, answered, draw_scene, draw_spec
from miniature.shapes.train_scorer import area, areas, batches, wrong
from tlcm_jax.config.build import load_losses
from tlcm_jax.config.schema import read
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.families.load import abstract_model

RED_STAR = Spec(groups=(Group(shape="star", colour="red", size="small"),))


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("miniature.shapes.contrastive", differentiable=True)


def test_it_tells_right_captions_from_such_with_one_thing_wrong(scorer):
    found = areas(scorer, RUNGS["r1"], 60)
    assert set(found) == {"all", "shape", "colour", "size"}
    # 0.98 of 300, shapes 0.94; 60 tell it less surely.
    assert found["all"] > 0.94 and min(found.values()) > 0.85


def test_its_gradient_can_be_followed(scorer):
    spec = Spec(groups=(Group(shape="circle", colour="red", size="large"),))
    image = jnp.asarray(render(draw_scene(spec, TEST_START, RUNGS["r1"]))[None] / np.float32(255))
    texts = scorer.texts(["a blue circle"])
    slope = jax.jit(jax.grad(lambda x: scorer.score(scorer.params, x, texts).sum()))

    def score(images: jax.Array) -> float:
        return float(scorer.score(scorer.params, images, texts)[0])

    moved = image
    for _ in range(5):
        gradient = slope(moved)
        moved = jnp.clip(moved + 0.5 * gradient / jnp.linalg.norm(gradient), 0, 1)
    assert score(moved) > score(image) + 5


def test_it_knows_the_words_of_the_world_apart_and_no_others(scorer):
    texts = [english(draw_spec(i, RUNGS["full"]), i % 3) for i in range(600)]
    known = {word for text in texts for word in text.replace(",", "").replace(":", "").split()}
    rows = words(sorted(known), scorer.network.rows)[:, 0]
    assert len(set(rows.tolist())) == len(known)
    scorer.check(texts, {})
    with pytest.raises(ValueError, match="a photograph"):
        scorer.check(["a photograph of a fox"], {})
    with pytest.raises(ValueError, match="caption"):
        scorer.check(["一颗红色星星"], {})


def test_its_row_of_real_renders(scorer):
    found = scorer.real_data_score("test", 16)
    assert found["contrastive"] == pytest.approx(scorer.threshold, abs=15)
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 2e6
    assert load("").threshold == scorer.threshold


def test_recipes_follow_it_by_gradient_and_by_reward_with_as_many_calls():
    calls = {}
    for variant in ("preference", "reward"):
        settings = read(shapes.get_config(variant).to_dict())
        loss = load_losses(settings, abstract_model(settings.model.path))[variant]
        assert loss.prompt_inputs(["a red star", "a small ring"]).keys() == {variant}
        calls[variant] = loss.nfe_per_pair
    assert calls["preference"] == calls["reward"]


def test_one_thing_is_made_wrong():
    rng = np.random.default_rng(0)
    rung = RUNGS["r3"]
    for what in ("shape", "colour", "size"):
        changed = wrong(RED_STAR, RUNGS["r1"], rng, what)
        differ = [a for a in ("shape", "colour", "size", "number")
                  if getattr(changed.groups[0], a) != getattr(RED_STAR.groups[0], a)]  # fmt: skip
        assert differ == [what]
    assert wrong(RED_STAR, RUNGS["r1"], rng, "relation") is None
    assert wrong(RED_STAR, rung, rng, "number").groups[0].number in (2, 3, 4)
    pair = Spec(groups=(Group(shape="star"), Group(shape="ring")), relation="above")
    assert wrong(pair, rung, rng, "relation").relation != "above"


def test_batches_know_what_answers_what_and_go_on_where_they_are_told():
    batch = next(batches(0, 6, ["r1"]))
    assert batch["images"].shape == (6, 64, 64, 3) and batch["answers"].shape == (6, 12)
    assert batch["answers"][:, :6].diagonal().all()  # each its own caption
    assert not batch["answers"][:, 6:].diagonal().any()  # and not the one with a thing wrong
    later = next(batches(3, 6, ["r1"]))
    assert not np.array_equal(later["images"], batch["images"])
    np.testing.assert_array_equal(later["images"], next(batches(3, 6, ["r1"]))["images"])


def test_what_answers_a_spec():
    scene = draw_scene(RED_STAR, TEST_START, RUNGS["r1"])
    assert answered(scene.things, Spec(groups=(Group(shape="star"),)))
    assert not answered(scene.things, Spec(groups=(Group(shape="ring"),)))
    assert not answered(scene.things, Spec(groups=(Group(number=2, shape="star"),)))


def test_the_area_under_the_curve():
    assert area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
