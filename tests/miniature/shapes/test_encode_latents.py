"""Real latents of the world of shapes: which scenes, in whose wording, and as a run reads them."""

import numpy as np
import pytest

from miniature.shapes.codec import LinearCodec, centred
from miniature.shapes.encode_latents import encode
from miniature.shapes.prompts import held_text
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, draw_scene, draw_spec
from tlcm_jax.data.latents import read_latents


@pytest.fixture(scope="module")
def codec():
    rng = np.random.default_rng(0)
    weight, inverse = (
        rng.normal(size=shape).astype(np.float32) for shape in ((192, 24), (24, 192))
    )
    zeros = np.zeros(192, np.float32)
    return LinearCodec(weight=weight, bias=zeros[:24], inverse=inverse, mean=zeros)


def test_captions_that_are_kept_from_distillation_are_passed_over(codec, tmp_path):
    rung = RUNGS["r1"]
    encoded = encode(codec, 0.17, rung, 40)
    assert not any(held_text(str(text)) for text in encoded["captions"])
    np.savez(tmp_path / "latents.npz", **encoded)
    found = read_latents(tmp_path / "latents.npz", (8, 8, 24))
    assert len(found.captions) == 40
    first = render(draw_scene(draw_spec(0, rung), 0, rung))
    expected = 0.17 * codec.encode(centred(first[None]))[0]
    rows = [np.allclose(latent, expected, atol=0.02) for latent in found.latents.astype(np.float32)]
    assert rows[0] and sum(rows) == 1
