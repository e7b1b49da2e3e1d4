"""LPIPS of images against its package, on the same random trunk and the published weights."""

import jax
import numpy as np
import pytest

reason = "parity with PyTorch needs torch, torchvision and lpips"
torch = pytest.importorskip("torch", reason=reason)
torchvision = pytest.importorskip("torchvision", reason=reason)
lpips = pytest.importorskip("lpips", reason=reason)

from tests.support.torch_networks import array, relative, tensor  # noqa: E402
from tlcm_jax.evaluation.scorers import pairwise  # noqa: E402
from tlcm_jax.io.files import save_tensors  # noqa: E402
from tlcm_jax.io.lpips_files import FILES, load_lpips  # noqa: E402


@pytest.mark.parametrize("trunk", FILES)
def test_distances(trunk, tmp_path):
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False).requires_grad_(False)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    heads = {k: v for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    trunks = {"features." + k.split(".", 2)[2]: v for k, v in state.items() if k.startswith("net.")}
    unused = {"classifier.1.weight": np.zeros((2, 2), np.float32)}
    lin, base = (tmp_path / f"{stem}.safetensors" for stem in FILES[trunk])
    save_tensors(base, trunks | unused)
    with pytest.raises(FileNotFoundError, match=f"convert {lin.stem}.pth of weights/v0.1"):
        load_lpips(tmp_path, trunk)
    save_tensors(lin, heads)
    network, params = load_lpips(tmp_path, trunk)
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 3, 75, 67, 3)).astype(np.float32)
    expected = array(theirs(tensor(a, images=True), tensor(b, images=True)))[:, 0, 0, 0]
    apply = jax.jit(network.apply)
    assert relative(apply({"params": params}, a, b), expected) < 1e-5
    np.testing.assert_allclose(apply({"params": params}, a, a), 0, atol=1e-12)
    if trunk == "vgg":  # compiles slowly
        return
    gradient = jax.jit(jax.grad(lambda x: network.apply({"params": params}, x, a).sum()))(a)
    assert np.isfinite(gradient).all()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trunk 'squeeze' is not one of alex, vgg"):
        load_lpips(tmp_path, "squeeze")
    (tmp_path / "alex.pth").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="convert_weights .*alex.pth"):
        load_lpips(tmp_path)


def test_distances_of_drawn_images(tmp_path):
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).requires_grad_(False)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    trunk = {"features." + k.split(".", 2)[2]: v for k, v in state.items() if k[:4] == "net."}
    heads = {k: v for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    for stem, tensors in zip(FILES["alex"], (heads, trunk), strict=True):
        save_tensors(tmp_path / f"{stem}.safetensors", tensors)
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    found = pairwise.distances(pairwise.lpips_distance(tmp_path), *images, batch=2)
    pair = (tensor(each.astype(np.float32) / 127.5 - 1, images=True) for each in images)
    assert relative(found, array(theirs(*pair))[:, 0, 0, 0]) < 1e-5
