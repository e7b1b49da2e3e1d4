"""Total variation: near 0 on real renders, its closed form where a mode is missing."""

import numpy as np
import pytest

from miniature.shapes.open_attributes import distances, load
from miniature.shapes.prompts import open_entries, spec_of
from miniature.shapes.scene import RUNGS, Group, Spec
from miniature.shapes.scorer import reals

R1 = RUNGS["r1"]


def test_real_renders_are_near_their_distribution_and_one_mode_is_not():
    star = [Spec(groups=(Group(shape="star"),))] * 120
    found = distances(reals(star, R1), star, R1)
    # 8 colours less the held-out one, and two sizes; the mean of 120 draws' own distance is 0.08.
    assert found["colour"] < 0.15
    assert found["size"] < 0.1
    assert set(found) == {"size", "colour", "place"}

    red = [Spec(groups=(Group(shape="star", colour="red", size="small"),))] * 24
    collapsed = distances(reals(red, R1), star[:24], R1)
    assert collapsed["colour"] == pytest.approx(1 - 1 / 7)
    assert collapsed["size"] == pytest.approx(1 / 2)


def test_a_set_is_scored_in_parts_as_at_once():
    scorer = load()
    entries = open_entries(R1, 32)
    prompts = [entry["prompt"] for entry in entries]
    images = reals([spec_of(entry) for entry in entries], R1)
    scorer.check(prompts, {})
    whole = scorer.values(images, prompts, {})
    parts = [scorer.values(images[r], [prompts[i] for i in r], {}) for r in np.split(np.r_[:32], 4)]
    joined = {k: np.concatenate([part[k] for part in parts]) for k in whole}
    assert scorer.summarise(joined) == scorer.summarise(whole)
    assert scorer.summarise(whole) == scorer.real_data_score("open", 32)
    assert scorer.real_data_score("another file", 32) == {}


def test_images_that_do_not_answer_are_not_counted():
    scorer = load()
    blank = np.full((2, 64, 64, 3), 200, np.uint8)
    found = scorer.summarise(scorer.values(blank, ["a star"] * 2, {}))
    assert np.isnan(list(found.values())).all()
    with pytest.raises(ValueError, match="open_attributes=r9: give one of r1"):
        load("r9")
