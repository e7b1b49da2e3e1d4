"""The miniature's contrastive scorer: what it scores, what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniature.contrastive import LENGTH, ContrastiveNetwork, ContrastiveScorer, words
from tlcm_jax.evaluation.scorers.table import load_scorer


@pytest.fixture(scope="module")
def scorer():
    network = ContrastiveNetwork(widths=(8,), features=8, resolution=8)
    blank = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(network.init)(jax.random.key(0), blank, words(["a"]))["params"]
    params["words"]["embedding"] = params["words"]["embedding"] * 10
    return ContrastiveScorer(network, params, 16.0)


def test_a_score_is_a_hundred_times_a_cosine(scorer):
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))
    texts = scorer.texts(["a red cat", "a red  CAT!", "an icon"])
    found = scorer.score(scorer.params, images[:1].repeat(3, 0), texts)
    assert np.all(np.abs(found) <= 100)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)  # the same words
    assert abs(float(found[0] - found[2])) > 1e-3
    larger = jax.image.resize(images, (3, 16, 16, 3), "nearest")
    assert scorer.score(scorer.params, larger, texts).shape == (3,)


def test_words_are_rows_that_every_process_agrees_on():
    table = words(["a red cat", "", "w " * 40])
    assert table.shape == (3, LENGTH) and table.dtype == np.int32
    assert not table[1].any() and table[2].all() and len(set(table[0, :3])) == 3
    assert table[0, 0] == 1 + 3904355907 % 8191  # zlib.crc32(b"a")


def test_what_is_saved_is_what_is_loaded(scorer, tmp_path):
    scorer.save(tmp_path)
    loaded = load_scorer("miniature.contrastive", str(tmp_path), differentiable=True)
    images, texts = jnp.full((1, 8, 8, 3), 0.3), scorer.texts(["a cat"])
    found = loaded.score(loaded.params, images, texts)
    np.testing.assert_allclose(found, scorer.score(scorer.params, images, texts), atol=0.2)  # fp16
    assert loaded.threshold == 16.0
    (tmp_path / "scorer.json").unlink()
    with pytest.raises(FileNotFoundError, match="scorer.json is missing; train one with"):
        load_scorer("miniature.contrastive", str(tmp_path), differentiable=True)
