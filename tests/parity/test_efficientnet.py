"""EfficientNet-lite0 against the PyTorch package that its checkpoint was made for."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch")
reference = pytest.importorskip(
    "efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch: the extra `verify`"
)

from miniature import efficientnet  # noqa: E402


def _reference(seed):
    """The package's network with random weights and, unlike a fresh one, random statistics."""
    torch.manual_seed(seed)
    # image_size=None chooses the package's padding for any size, the one its own training used.
    model = reference.EfficientNet.from_name(
        "efficientnet-lite0", image_size=None, drop_connect_rate=0.0
    ).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(0, 0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
        for name, value in model.named_parameters():
            if "_bn" in name and name.endswith("weight"):
                value.uniform_(1, 3)  # away from a vanishing signal after 16 blocks
            elif "_bn" in name:
                value.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("size", [96, (50, 75)])
def test_feature_maps_equal_the_package(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    model = _reference(0)
    images = np.random.default_rng(0).uniform(size=(2, height, width, 3)).astype(np.float32)
    normalised = (images - np.float32(efficientnet._MEAN)) / np.float32(efficientnet._STD)
    with torch.no_grad():
        expected = model.extract_features(torch.from_numpy(normalised).permute(0, 3, 1, 2))
    expected = expected.permute(0, 2, 3, 1).numpy()
    params = efficientnet.from_torch({k: v.numpy() for k, v in model.state_dict().items()})
    network = jax.jit(efficientnet.EfficientNetLite0().apply)
    ours, blocks = network({"params": params}, images)

    assert len(blocks) == 16
    assert ours.shape == expected.shape == (2, -(-height // 32), -(-width // 32), 1280)
    assert expected.std() > 0.05  # the comparison would mean nothing on a dead output
    error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
    assert error < 1e-5
