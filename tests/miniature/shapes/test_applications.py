"""What the measurements of applications count: real renders keep to their maps, others not."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from miniature.shapes import applications
from miniature.shapes.prompts import prompt_sets, spec_of
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS
from miniature.shapes.splits import HELD_PAIRS


@pytest.fixture(scope="module")
def scenes():
    entries = applications.spread(prompt_sets(RUNGS["r1"])["test"], 24)
    return applications.scenes_of([spec_of(entry) for entry in entries])


def moved(scene, by):
    (thing,) = scene.things
    away = by if thing.x < 32 else -by
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, x=thing.x + away),))


def test_real_renders_keep_to_their_maps(scenes):
    found = applications.kept(np.stack([render(scene) for scene in scenes]), scenes)
    assert all(value.all() for value in found.values())


def test_an_object_elsewhere_does_not(scenes):
    for by, overlaps in ((4, 0.5), (12, 0.0)):
        images = np.stack([render(moved(scene, by)) for scene in scenes])
        found = applications.kept(images, scenes)
        assert not found["place"].any() and found["shape"].all()
        assert found["overlap"].mean() <= overlaps
    blank = np.full((len(scenes), 64, 64, 3), 200, np.uint8)
    assert not any(value.any() for value in applications.kept(blank, scenes).values())


def test_style_prompts_name_another_colour(scenes):
    specs = applications.colour_specs(scenes)
    named = [spec.groups[0].colour for spec in specs]
    assert not any(c == s.things[0].colour for c, s in zip(named, scenes, strict=True))
    shapes = [scene.things[0].shape for scene in scenes]
    assert not HELD_PAIRS & set(zip(shapes, named, strict=True))
    assert len(set(named)) >= 6
    images = np.stack([render(scene) for scene in scenes])
    assert not applications.right(images, specs).any()


def test_a_sheet_has_a_row_for_each(scenes, tmp_path, capsys):
    images = np.stack([render(scene) for scene in scenes])
    applications.write_sheet(tmp_path / "s.png", {"one": images, "two": images}, columns=4)
    assert Image.open(tmp_path / "s.png").size == (512, 256)
    assert "one; two" in capsys.readouterr().out
