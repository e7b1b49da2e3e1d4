"""The autoencoder, shrunk, against diffusers on the same random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and diffusers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from tests.support.blockwise import blockwise  # noqa: E402
from tests.support.published import VAE as SDXL  # noqa: E402
from tests.support.torch_networks import array, relative, tensor, twins  # noqa: E402
from tlcm_jax.models.vae import AutoencoderKL, VAEConfig  # noqa: E402

SMALL = {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8}
SD_1 = {name: SDXL[name] for name in SDXL if name not in ("force_upcast", "scaling_factor")}
FP16_FIX = SDXL | {
    "force_upcast": False,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
CONFIGS = {
    "sdxl": (SDXL, 0.13025),
    "sd-1.5": (SD_1, 0.18215),
    "fp16-fix": (FP16_FIX, 0.13025),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    raw, scaling = CONFIGS[request.param]
    ours = AutoencoderKL(VAEConfig.from_dict(raw | SMALL))
    theirs = diffusers.AutoencoderKL.from_config(raw | SMALL)
    assert ours.config.scaling_factor == theirs.config.scaling_factor == scaling
    return ours, twins(ours, theirs), theirs


def apply(vae, params, inputs, method):
    with blockwise():
        return vae.apply({"params": params}, jnp.asarray(inputs), method=method)


def test_encode(pair):
    ours, params, theirs = pair
    images = np.random.default_rng(1).uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)
    mean, logvar = apply(ours, params, images, "encode")
    with torch.no_grad():
        expected = theirs.encode(tensor(images, images=True)).latent_dist
    assert mean.shape == (2, 3, 5, 4)
    assert relative(mean, array(expected.mean, images=True)) < 1e-5
    assert relative(logvar, array(expected.logvar, images=True)) < 1e-5


def test_decode(pair):
    ours, params, theirs = pair
    latents = np.random.default_rng(2).standard_normal((2, 3, 5, 4), np.float32)
    with torch.no_grad():
        expected = array(theirs.decode(tensor(latents, images=True)).sample, images=True)
    assert relative(apply(ours, params, latents, "decode"), expected) < 1e-5
    if ours.config.scaling_factor == 0.18215:  # once: the three are the same network
        half = apply(ours.clone(dtype=jnp.bfloat16), params, latents, "decode")
        assert half.dtype == jnp.float32
        assert relative(half, expected) < 2e-2


def test_the_posterior_s_log_variance_is_clipped(pair):
    ours, params, _ = pair
    bias = np.array([0] * 4 + [-40, 40, 0, 0], np.float32)
    params = params | {"quant_conv": params["quant_conv"] | {"bias": bias}}
    images = np.zeros((2, 24, 40, 3), np.float32)
    _, logvar = apply(ours, params, images, "encode")
    assert np.all(logvar[..., 0] == -30) and np.all(logvar[..., 1] == 20)
