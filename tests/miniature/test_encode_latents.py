"""Real latents of the miniature: which pictures, in whose wording, and that a run can read them."""

import jax.numpy as jnp
import numpy as np

from miniature.captions import captions, wording
from miniature.encode_latents import encode
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.data.latents import read_latents
from tlcm_jax.families.load import load_model

STYLES = ("noto", "twemoji")


def dataset(count):
    rng = np.random.default_rng(0)
    hexcodes = [f"1f{600 + i}" for i in range(count)]
    styles = rng.integers(2, size=count)
    texts = [captions(f"thing {i}", STYLES[s]) for i, s in enumerate(styles)]
    held = np.arange(count) % 5
    return {
        "images": rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8),
        "class_ids": np.arange(count),
        "style_ids": styles,
        "composition": held == 0,
        "heldout": held == 1,
        "captions": np.array(texts),
        "class_hexcodes": np.array(hexcodes),
        "style_names": np.array(STYLES),
    }


def test_latents_of_the_pictures_that_distillation_may_see(tmp_path):
    pipeline = load_model(write_tiny_pipeline(tmp_path / "tiny"))
    data = dataset(20)
    encoded = encode(pipeline, data, batch=8)
    np.savez(tmp_path / "latents.npz", **encoded)
    found = read_latents(tmp_path / "latents.npz", pipeline.latent_shape())
    rows = [i for i in range(20) if i % 5 > 1]
    assert len(found.captions) == 12
    for place, row in enumerate(rows):
        style = STYLES[data["style_ids"][row]]
        wanted = captions(f"thing {row}", style)[wording(data["class_hexcodes"][row], style)]
        assert found.captions[place] == wanted
    expected = pipeline.encode_images(jnp.asarray(data["images"][rows] / np.float32(255)))
    np.testing.assert_allclose(found.latents, expected, rtol=2e-3, atol=2e-3)
    assert len(set(found.captions)) == 12 and found.latents.std() > 0
