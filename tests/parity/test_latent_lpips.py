"""The published E-LatentLPIPS against its package, on the same random weights."""

import importlib
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest

reason = "parity with PyTorch needs torch, torchvision and elatentlpips"
torch = pytest.importorskip("torch", reason=reason)
pytest.importorskip("torchvision", reason=reason)
if importlib.util.find_spec("elatentlpips") is None:
    pytest.skip(reason, allow_module_level=True)

from tests.support.torch_networks import array, relative, tensor  # noqa: E402
from tlcm_jax.io.convert_weights import convert_weights  # noqa: E402
from tlcm_jax.io.latent_lpips_files import load_latent_lpips  # noqa: E402
from tlcm_jax.models.latent_lpips import ELatentLPIPS, channels_of  # noqa: E402


@pytest.fixture(scope="module")
def theirs():
    """The package's network for SDXL's latents, random; its constructor fetches."""
    with pytest.MonkeyPatch.context() as patch:
        # Its augmentations build CUDA kernels when they are imported; they are not used here.
        augment = types.ModuleType("elatentlpips.ada_aug")
        augment.AdaAugment = None
        patch.setitem(sys.modules, "elatentlpips.ada_aug", augment)
        package = importlib.import_module("elatentlpips.elatentlpips")
        vgg = importlib.import_module("elatentlpips.vgg16")
    torch.manual_seed(0)
    features = vgg.LatentVGG16BN(4).model.features
    with pytest.MonkeyPatch.context() as patch:
        found = types.SimpleNamespace(features=features)
        patch.setattr(vgg.tv, "vgg16_bn", lambda **choices: found)
        patch.setattr(vgg, "LatentVGG16BN", lambda *args, **choices: None)
        network = package.ELatentLPIPS(
            pretrained=False, pnet_rand=True, encoder="sdxl", augment=None, verbose=False
        )
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.2)
        elif name.startswith("lin"):
            value.uniform_(0, 1)
    return network.requires_grad_(False)


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
def test_distances(theirs, size, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "sdxl_latest_vgg16_tuned.pth")
    with pytest.raises(ValueError, match="convert_weights .*sdxl_latest_vgg16_tuned.pth"):
        load_latent_lpips(tmp_path)
    convert_weights(tmp_path / "sdxl_latest_vgg16_tuned.pth")
    network, params = load_latent_lpips(tmp_path)
    assert network == ELatentLPIPS() and channels_of(params) == 4
    a, b = np.random.default_rng(0).normal(size=(2, 3, *size, 4)).astype(np.float32)
    expected = theirs(
        tensor(a, images=True), tensor(b, images=True), ensembling=False, add_l1_loss=False
    )
    ours = jax.jit(network.apply)({"params": params}, a, b)
    assert relative(ours, array(expected)[:, 0, 0, 0]) < 1e-5
