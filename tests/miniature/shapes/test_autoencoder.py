"""The autoencoder is the linear codec, in Flax and in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniature.shapes import autoencoder
from miniature.shapes.codec import LinearCodec, centred, fit_linear
from miniature.shapes.render import picture
from miniature.shapes.scene import RUNGS, TEST_START


@pytest.fixture(scope="module")
def codec() -> LinearCodec:
    return fit_linear(pictures=1500)


@pytest.fixture(scope="module")
def params(codec) -> dict:
    return autoencoder.initial_params(codec)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return centred(np.stack([picture(TEST_START + i, RUNGS["full"]) for i in range(6)]))


def test_the_codec_survives_its_file(codec, images, tmp_path):
    codec.save(tmp_path / "codec.npz")
    loaded = LinearCodec.load(tmp_path / "codec.npz")
    np.testing.assert_array_equal(loaded.encode(images), codec.encode(images))
    np.testing.assert_array_equal(codec.weight, codec.weight.astype(np.float16))


def test_the_way_back_is_a_projection(codec, images):
    once = codec.encode(images)
    unclipped = once @ codec.inverse + codec.mean
    again = unclipped @ codec.weight + codec.bias
    np.testing.assert_allclose(again, once, atol=1e-4)


def test_encoder_is_the_linear_codec(codec, params, images):
    network = autoencoder.network()
    encode = jax.jit(lambda x: network.apply({"params": params}, x, method=network.encode))
    mean, logvar = encode(images)
    expected = codec.encode(images)
    assert np.abs(mean - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    assert np.all(np.asarray(logvar) == -30)


def test_decoder_is_the_linear_codec(codec, params, images):
    network = autoencoder.network()
    decode = jax.jit(lambda z: network.apply({"params": params}, z, method=network.decode))
    latents = codec.encode(images)
    expected = codec.decode(latents)
    error = np.clip(decode(latents), -1, 1) - expected
    assert np.abs(error).mean() < 0.02  # two and a half grey levels
    assert np.abs(error).max() < 0.2


def test_diffusers_encodes_and_decodes_the_same(codec, params, images, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle is diffusers: the extra `verify`")
    diffusers = pytest.importorskip("diffusers", reason="the extra `verify`")
    autoencoder.save(tmp_path, params, scaling_factor=0.17)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert theirs.config.scaling_factor == 0.17 and theirs.config.force_upcast
    with torch.no_grad():
        encoded = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist.mean
        decoded = theirs.decode(encoded).sample
    expected = codec.encode(images)
    found = encoded.numpy().transpose(0, 2, 3, 1)
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    network = autoencoder.network()
    ours = network.apply({"params": params}, jnp.asarray(found), method=network.decode)
    np.testing.assert_allclose(decoded.numpy().transpose(0, 2, 3, 1), ours, atol=5e-3)
