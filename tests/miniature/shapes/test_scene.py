"""The world as a pure function of integers, and what training never sees of it."""

from collections import Counter

import numpy as np
import pytest

from miniature.shapes.render import picture, render
from miniature.shapes.scene import (
    DIAMETERS,
    RELATIONS,
    RUNGS,
    SIDE,
    TEST_START,
    Group,
    Spec,
    draw_scene,
    draw_spec,
    related,
)
from miniature.shapes.splits import HELD_PAIRS, HELD_RELATIONS, held_out

FULL = RUNGS["full"]


@pytest.mark.parametrize("rung", RUNGS)
def test_a_picture_is_a_function_of_its_integer(rung):
    first, again = picture(TEST_START + 3, RUNGS[rung]), picture(TEST_START + 3, RUNGS[rung])
    assert first.shape == (SIDE, SIDE, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert np.any(first != picture(TEST_START + 4, RUNGS[rung]))


def test_the_renderer_is_the_committed_one():
    # A change of a single pixel changes every figure of the world: say so in the data card.
    sums = [int(picture(i, FULL).astype(int).sum()) for i in (0, 1, TEST_START)]
    assert sums == [532910, 517762, 2675444]


def test_a_scene_answers_its_spec():
    for index in range(300):
        spec = draw_spec(index, FULL)
        scene = draw_scene(spec, index, FULL)
        assert len(scene.counts) == len(spec.groups)
        things = iter(scene.things)
        for group, count in zip(spec.groups, scene.counts, strict=True):
            assert count == group.number or (group.number is None and 2 <= count <= 4)
            for thing in (next(things) for _ in range(count)):
                for attribute in ("size", "contrast", "fill", "colour", "shape"):
                    assert getattr(group, attribute) in (None, getattr(thing, attribute))
                low, high = DIAMETERS[thing.size]
                assert low <= 2 * thing.radius <= high
        if spec.relation:
            places = [(thing.x, thing.y) for thing in scene.things]
            assert related(spec.relation, *places)
            assert not any(related(r, *places) for r in RELATIONS if r != spec.relation)


def test_objects_lie_inside_and_apart():
    for index in range(200):
        things = draw_scene(draw_spec(index, FULL), index, FULL).things
        for i, a in enumerate(things):
            assert min(a.x, a.y, SIDE - a.x, SIDE - a.y) >= a.radius + 1
            for b in things[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + 2


def test_open_attributes_are_uniform():
    spec = Spec(groups=(Group(shape="star"),))
    rung = RUNGS["r1"]
    things = [draw_scene(spec, i, rung).things[0] for i in range(2000)]
    sizes = Counter(thing.size for thing in things)
    colours = Counter(thing.colour for thing in things)
    assert abs(sizes["small"] / 2000 - 0.5) < 0.04
    # Seven of the eight colours: a star of the eighth is held out.
    assert ("star", "green") in HELD_PAIRS and set(colours) == set(rung.colours) - {"green"}
    assert all(abs(count / 2000 - 1 / 7) < 0.04 for count in colours.values())


def test_training_never_sees_what_is_held_out():
    assert len(HELD_PAIRS) == 8
    assert 0.02 < len(HELD_RELATIONS) / (8 * 4 * 8) < 0.09
    # Both ways of saying an arrangement are held out together.
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    assert {(b, opposite[r], a) for a, r, b in HELD_RELATIONS} == HELD_RELATIONS
    for index in range(400):
        spec = draw_spec(index, RUNGS["r3"])
        assert not held_out(spec)
        things = draw_scene(spec, index, RUNGS["r3"]).things
        assert not {(thing.shape, thing.colour) for thing in things} & HELD_PAIRS


def test_a_held_out_object_can_be_drawn_when_it_is_named():
    shape, colour = sorted(HELD_PAIRS)[0]
    spec = Spec(groups=(Group(shape=shape, colour=colour),))
    assert held_out(spec)
    thing = draw_scene(spec, TEST_START, RUNGS["r1"]).things[0]
    assert (thing.shape, thing.colour) == (shape, colour)
    assert render(draw_scene(spec, TEST_START, RUNGS["r1"])).std() > 0
