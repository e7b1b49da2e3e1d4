"""Maps say where an object is and of which shape, and nothing of its colour."""

import dataclasses

import jax
import numpy as np
import pytest

from miniature.shapes import maps
from miniature.shapes.captions import parse_english
from miniature.shapes.render import picture
from miniature.shapes.scene import RUNGS, TEST_START, Group, Spec, draw_scene
from tlcm_jax import paths
from tlcm_jax.families.load import load_model

RUNG = RUNGS["r1"]


def scene(**named):
    return draw_scene(Spec(groups=(Group(**named),)), TEST_START, RUNG)


def test_an_outline_goes_around_the_silhouette():
    drawn = scene(shape="square", size="large")
    inside, edge = maps.silhouettes(drawn) > 0.5, maps.outline(drawn)[..., 0] > 0
    # A square of 0.78 radius: half a side.
    radius = 0.78 * drawn.things[0].radius
    assert abs(inside.sum() - (2 * radius) ** 2) < 0.1 * inside.sum()
    assert 8 * radius < edge.sum() < 3 * 8 * radius
    rows, columns = np.nonzero(edge)
    assert abs(columns.mean() + 0.5 - drawn.things[0].x) < 0.5
    assert abs(rows.mean() + 0.5 - drawn.things[0].y) < 0.5


def test_no_map_knows_a_colour():
    red = scene(shape="heart", colour="red")
    thing = dataclasses.replace(red.things[0], colour="blue", tone=(1.0, 0.0, 0.0, 0.0))
    blue = dataclasses.replace(red, things=(thing,))
    for map_of in (maps.outline, maps.layout):
        np.testing.assert_array_equal(map_of(red), map_of(blue))


def test_examples_are_training_scenes_with_captions_of_the_world(monkeypatch):
    # Pixels in the place of latents.
    monkeypatch.setattr(maps, "encode", lambda images: images.astype(np.float32))
    batch = next(maps.outlines(5, 0))
    batch.check("here", (64, 64), 3)
    again, other = next(maps.outlines(5, 0)), next(maps.layouts(5, 1))
    np.testing.assert_array_equal(batch.latents, again.latents)
    assert np.any(batch.latents != other.latents)
    other.check("here", (64, 64), 1)
    assert all(parse_english(text).groups for text in batch.texts)
    # Pictures change where the outline lies.
    for image, edge in zip(batch.latents, batch.maps, strict=True):
        change = np.abs(np.diff(image, axis=1)).max(-1)
        assert change[edge[:, 1:, 0] > 0].mean() > 3 * change[edge[:, 1:, 0] == 0].mean()


@pytest.mark.slow
def test_latents_are_the_encoder_s():
    model = load_model(paths.MINIATURE / "shapes-xl")
    images = np.stack([picture(TEST_START + i, RUNG) for i in range(2)])
    expected = jax.jit(model.encode_images)(images.astype(np.float32) / 255)
    np.testing.assert_allclose(maps.encode(images), expected, atol=2e-4)
