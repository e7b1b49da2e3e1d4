"""The judge by construction: right on real renders, and wrong pictures found out."""

import dataclasses
import itertools

import numpy as np
import pytest

from miniature.shapes.codec import centred, fit_linear
from miniature.shapes.parser import parse, satisfies
from miniature.shapes.render import render
from miniature.shapes.scene import (
    ATTRIBUTES,
    GROUNDS,
    RUNGS,
    STYLES,
    TEST_START,
    Group,
    Scene,
    Spec,
    draw_scene,
    draw_spec,
)


def whole(scene: Scene) -> Spec:
    """Everything that a judge can check of a scene."""
    groups = tuple(Group(**{a: getattr(t, a) for a in ATTRIBUTES}) for t in scene.things)
    return Spec(groups=groups, style=scene.style, ground=scene.ground)


def accuracy(rung: str, count: int, change=lambda image: image) -> float:
    """Share of scenes of which the parser reads everything, whether a caption names it or not."""
    right = 0
    for index in range(TEST_START, TEST_START + count):
        scene = draw_scene(draw_spec(index, RUNGS[rung]), index, RUNGS[rung])
        right += satisfies(parse(change(render(scene)), RUNGS[rung]), whole(scene))
    return right / count


@pytest.mark.parametrize("rung", ["r1", "r3"])
def test_reads_real_renders(rung):
    assert accuracy(rung, 100) >= 0.98


@pytest.mark.slow
def test_reads_real_renders_of_the_whole_world():
    assert accuracy("full", 60) >= 0.93


def test_reads_every_style_and_ground():
    rung = RUNGS["full"]
    for i, (style, ground) in enumerate(itertools.product(STYLES, GROUNDS)):
        if (style, ground) == ("outlined", "dark"):
            continue  # a rim as dark as the ground is hard to tell
        group = Group(shape="square", colour="blue", size="large", contrast="bold", fill="plain")
        spec = Spec(groups=(group,), style=style, ground=ground)
        found = parse(render(draw_scene(spec, TEST_START + i, rung)), rung)
        assert satisfies(found, spec), (style, ground, found)


def test_reads_renders_through_the_linear_codec():
    codec = fit_linear(pictures=1500)

    def decoded(image: np.ndarray) -> np.ndarray:
        return codec.decode(codec.encode(centred(image[None])))[0] / 2 + 0.5

    assert accuracy("r1", 100, decoded) >= 0.95


@pytest.fixture
def star() -> tuple[Scene, np.ndarray, Spec]:
    spec = Spec(groups=(Group(shape="star", colour="red", size="large"),))
    scene = draw_scene(spec, TEST_START + 5, RUNGS["r1"])
    return scene, render(scene), spec


def test_each_check_can_fail(star):
    scene, image, spec = star
    found = parse(image, RUNGS["r1"])
    assert satisfies(found, spec)
    (group,) = spec.groups
    for wrong in ({"shape": "heart"}, {"colour": "blue"}, {"size": "small"}, {"number": 2}):
        assert not satisfies(found, Spec(groups=(dataclasses.replace(group, **wrong),)))
    assert not satisfies(found, dataclasses.replace(spec, ground="dark"))
    assert not satisfies(found, dataclasses.replace(spec, style="soft"))


def test_relations_are_checked():
    spec = Spec(groups=(Group(shape="star"), Group(shape="ring")), relation="left of")
    image = render(draw_scene(spec, TEST_START, RUNGS["r2"]))
    found = parse(image, RUNGS["r2"])
    assert satisfies(found, spec)
    for relation in ("right of", "above", "below"):
        assert not satisfies(found, dataclasses.replace(spec, relation=relation))


def test_malformed_pictures_are_found_out(star):
    scene, image, spec = star
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, image.shape, dtype=np.uint8)
    ghost = (0.5 * image + 0.5 * np.roll(image, (9, 14), (0, 1))).astype(np.uint8)
    speck = image.copy()
    speck[:3, :3] = 0
    smear = image.copy()
    smear[::2] = image.mean((0, 1))
    for name, wrong in (("noise", noise), ("ghost", ghost), ("speck", speck), ("smear", smear)):
        assert not satisfies(parse(wrong, RUNGS["r1"]), spec), name


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64), np.uint8), "greyscale"),
        (np.zeros((64, 64, 1), np.uint8), "greyscale"),
        (np.zeros((32, 32, 3), np.uint8), r"picture of \(32, 32, 3\)"),
        (np.full((64, 64, 3), 200.0), "floats in 0..1"),
        (np.full((64, 64, 3), np.nan), "floats in 0..1"),
    ],
)
def test_foreign_pictures_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        parse(image, RUNGS["r1"])
