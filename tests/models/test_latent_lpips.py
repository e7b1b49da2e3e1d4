"""Latent LPIPS: what a distance must do, the network it is made of, and its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.io.latent_lpips_files import load_latent_lpips, save_latent_lpips
from tlcm_jax.models.latent_lpips import LatentLPIPS, LatentVGG, unit_length

NETWORK = LatentLPIPS(widths=(4, 4, 8, 8, 8))


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(0), (3, 8, 8, 4))


@pytest.fixture(scope="module")
def params(latents):
    return jax.jit(NETWORK.init)(jax.random.key(1), latents, latents)["params"]


def test_it_is_vgg16_without_its_first_three_max_pools():
    """Thirteen convolutions with VGG16's 14.7 M weights (4 input channels), one halving left."""
    z = jax.ShapeDtypeStruct((1, 16, 16, 4), jnp.float32)
    network = LatentVGG()
    shapes = jax.eval_shape(network.init, jax.random.key(0), z)
    assert len(shapes["params"]) == 13
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert size == 14_714_688 + 64 * 9 * (4 - 3)
    stages = jax.eval_shape(network.apply, shapes, z)
    assert [s.shape[1:] for s in stages] == [
        (16, 16, 64), (16, 16, 128), (16, 16, 256), (16, 16, 512), (8, 8, 512),
    ]  # fmt: skip


def test_it_is_a_distance(params, latents):
    apply = jax.jit(lambda params, a, b: NETWORK.apply({"params": params}, a, b))
    other = latents + 0.3
    found = apply(params, latents, other)
    assert np.all(found > 1e-3)
    # Squares of the rounding between two places of one batch.
    np.testing.assert_allclose(apply(params, latents, latents), 0, atol=1e-12)
    np.testing.assert_allclose(found, apply(params, other, latents), rtol=1e-5)
    # Whatever a training step makes of the weights.
    negative = {k: -v if k.startswith("lin") else v for k, v in params.items()}
    np.testing.assert_array_equal(found, apply(negative, latents, other))


def test_features_have_unit_length_and_a_gradient_where_they_vanish():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit_length(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(unit_length(x)))(x)))


def test_what_is_saved_is_what_is_loaded(params, tmp_path):
    save_latent_lpips(tmp_path, NETWORK, params, 4, {"latent_lpips": 0.8})
    network, loaded = load_latent_lpips(tmp_path)
    assert network == NETWORK
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, loaded)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("8", "16", 1))
    with pytest.raises(ValueError, match="does not fit its config: "):
        load_latent_lpips(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="holds no latent LPIPS"):
        load_latent_lpips(tmp_path)
