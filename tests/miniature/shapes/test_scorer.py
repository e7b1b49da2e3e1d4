"""The parser as a scorer: right on real renders of a caption, wrong on those of another."""

import numpy as np
import pytest

from miniature.shapes.captions import chinese, english
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, TEST_START, Group, Spec, draw_scene
from miniature.shapes.scorer import load
from tlcm_jax.evaluation.scorers.table import load_scorer

SPECS = [
    Spec(groups=(Group(shape="star", colour="red"),)),
    Spec(groups=(Group(shape="ring"),)),
    Spec(groups=(Group(colour="blue", size="large"),)),
]


def renders(specs: list[Spec]) -> np.ndarray:
    scenes = [draw_scene(spec, TEST_START + i, RUNGS["r1"]) for i, spec in enumerate(specs)]
    return np.stack([render(scene) for scene in scenes])


@pytest.mark.parametrize("write", [english, chinese])
def test_each_image_is_held_against_its_own_caption(write):
    scorer = load_scorer("miniature.shapes.scorer")
    prompts = [write(spec) for spec in SPECS]
    scorer.check(prompts, {})
    images = renders(SPECS)
    values = scorer.values(images, prompts, {})
    assert scorer.summarise(values) == {"all_checks": 1.0, "malformed": 0.0}
    turned = scorer.values(np.roll(images, 1, axis=0), prompts, {})
    np.testing.assert_array_equal(turned["all_checks"], [0, 0, 0])


def test_noise_is_malformed():
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    values = load("r1").values(noise, ["a star"], {})
    assert (values["all_checks"][0], values["malformed"][0]) == (0, 1)


def test_what_it_cannot_read_is_refused():
    scorer = load()
    with pytest.raises(ValueError, match="a photograph"):
        scorer.check(["a photograph of a fox"], {})
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)"):
        scorer.values(np.zeros((1, 32, 32, 3), np.uint8), ["a star"], {})
    with pytest.raises(ValueError, match="give one of r1, r2, r3, full"):
        load("r9")
