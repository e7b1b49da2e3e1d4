"""The autoencoder without PyTorch: decoding by tiles, large activations, refused configs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.published import VAE as SDXL
from tests.support.tiny_pipeline import random_params
from tlcm_jax.families.base import abstract_params
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig
from tlcm_jax.models.vae_tiling import decode_tiled, halo

SMALL = SDXL | {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL(VAEConfig.from_dict(SMALL))


@pytest.fixture(scope="module")
def params(vae):
    return random_params(abstract_params(vae), np.random.default_rng(0))


@pytest.fixture(scope="module")
def decode(vae):
    return jax.jit(lambda params, z: vae.apply({"params": params}, z, method=vae.decode))


@pytest.fixture(scope="module")
def latents():
    """Larger than a tile and its halo on both sides, flat to the left and wild to the right."""
    noise = np.random.default_rng(1).standard_normal((2, 29, 43, 4), np.float32)
    return jnp.asarray(noise * np.linspace(0.1, 3, 43, dtype=np.float32)[None, None, :, None])


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_halo_of_sdxl():
    assert halo(VAEConfig.from_dict(SDXL)) == 13


def test_the_halo_is_the_reach_of_the_convolutions(vae, params):
    """With norms that see nothing of the image, a far pixel moves a tile's pixels; no further."""
    reach = halo(vae.config)
    middle = jnp.zeros((1, 2 * reach + 3, 1, 32))

    def row(middle):
        images = vae.apply({"params": params}, middle, method=vae.decode_upwards)
        return images[0, 2 * reach + 2 : 2 * reach + 4].sum()  # of the latent row `reach + 1`

    def blind(call, arguments, keywords, context):
        if isinstance(context.module, nn.GroupNorm):
            return arguments[0]
        return call(*arguments, **keywords)

    with nn.intercept_methods(blind):
        moved = np.abs(jax.jit(jax.grad(row))(middle)).sum(axis=(0, 2, 3)) > 0
    assert list(np.flatnonzero(moved)) == list(range(1, 2 * reach + 2))


def test_tiles_give_the_untiled_picture(vae, params, decode, latents):
    whole = decode(params, latents)
    tiled = jax.jit(lambda params, z: decode_tiled(vae, params, z, tile=9))
    assert relative(tiled(params, latents), whole) < 1e-4
    # What lies far away matters, through statistics and attention: the test can fail.
    other = decode(params, latents * (np.arange(43) < 30)[:, None])
    assert relative(other[:, :, :40], whole[:, :, :40]) > 1e-2


def test_large_activations_stay_finite_in_bf16(vae, params, decode, latents):
    """SDXL's decoder leaves fp16's range; here the middle block does, by far."""
    kernel = params["decoder"]["conv_in"]["kernel"]
    conv_in = params["decoder"]["conv_in"] | {"kernel": 1e6 * kernel}
    params = params | {"decoder": params["decoder"] | {"conv_in": conv_in}}
    half = vae.clone(dtype=jnp.bfloat16)

    @jax.jit
    def decode_half(params, z):
        middle = half.apply({"params": params}, z, method=half.decode_middle)
        return middle, half.apply({"params": params}, middle, method=half.decode_upwards)

    middle, images = decode_half(params, latents)
    assert np.abs(middle).max() > np.finfo(np.float16).max
    assert np.all(np.isfinite(images))
    assert relative(images, decode(params, latents)) < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_mean": [0.1] * 4}, "latents_mean=.*only None"),
        ({"latents_std": [0.1] * 4}, "latents_std=.*only None"),
        ({"shift_factor": 0.1159}, "shift_factor=0.1159 is not supported"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "AttnUpDecoderBlock2D"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(SMALL | change)


def test_a_tile_has_pixels(vae, params, latents):
    with pytest.raises(ValueError, match="tile = 0"):
        decode_tiled(vae, params, latents, tile=0)
