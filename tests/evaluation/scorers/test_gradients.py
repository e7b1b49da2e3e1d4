"""Every scorer that preference may follow has a gradient, and it is the score's own slope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.scorer_files import write_scorers
from tlcm_jax.evaluation.scorers.table import load_scorer

FOLLOWED = ("clip", "aesthetic", "hps_v21", "image_reward", "mps", "pickscore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_gradient_is_the_slope(name, folders):
    scorer = load_scorer(name, str(folders[name]), differentiable=True)
    images = jax.random.uniform(jax.random.key(0), (2, 40, 36, 3), minval=0.2, maxval=0.8)
    # As the preference term calls it: the same images with their own texts and with others.
    own, other = (scorer.texts(texts) for texts in (["a red cat", "an icon"], ["red", "ice"]))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), own, other)

    def scores(images):
        return jax.vmap(scorer.score, in_axes=(None, None, 0))(scorer.params, images, both)

    @jax.jit
    def slopes(images):
        direction = jnp.sin(jnp.arange(images.size)).reshape(images.shape)
        gradient = jax.grad(lambda x: jnp.sum(scores(x)[0]))(images)
        step = 1e-2
        ahead, behind = (jnp.sum(scores(images + s * direction)[0]) for s in (step, -step))
        return scores(images), jnp.vdot(gradient, direction), (ahead - behind) / (2 * step)

    found, slope, expected = slopes(images)
    assert found.shape == (2, 2) and np.isfinite(found).all()
    np.testing.assert_allclose(slope, expected, rtol=0.02, atol=1e-3 * np.abs(found).max())
    assert abs(float(slope)) > 1e-4
    if name != "aesthetic":  # which reads no text
        assert np.abs(found[0] - found[1]).min() > 1e-4


def test_what_scores_whole_sets_cannot_be_followed(folders):
    with pytest.raises(ValueError, match="scorer 'fd_dinov2' has no gradient in the images"):
        load_scorer("fd_dinov2", str(folders["fd_dinov2"]), differentiable=True)
