"""The FID's Inception and its preprocessing against clean-fid, on the same random weights."""

import jax
import numpy as np
import pytest
from PIL import Image

reason = "parity with PyTorch needs torch, torchvision and clean-fid"
torch = pytest.importorskip("torch", reason=reason)
torchvision = pytest.importorskip("torchvision", reason=reason)
pytest.importorskip("cleanfid", reason=reason)

from cleanfid import inception_pytorch  # noqa: E402
from cleanfid.resize import build_resizer  # noqa: E402

from tests.support.odd_inputs import odd_images  # noqa: E402
from tests.support.torch_networks import array, relative, tensor  # noqa: E402
from tlcm_jax.evaluation.scorers import feature_distance  # noqa: E402
from tlcm_jax.evaluation.scorers.feature_distance import resize_float  # noqa: E402
from tlcm_jax.evaluation.scorers.table import load_scorer  # noqa: E402
from tlcm_jax.io.files import save_tensors  # noqa: E402
from tlcm_jax.models.inception import FIDInception  # noqa: E402


@pytest.fixture(scope="module")
def theirs():
    """The package's network with random weights and statistics; its own are fetched."""
    torch.manual_seed(0)
    state: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, found: None)
        network = inception_pytorch.fid_inception_v3()
        patch.setattr(inception_pytorch, "fid_inception_v3", lambda: network)
        whole = inception_pytorch.InceptionV3([3], resize_input=False, normalize_input=False)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.2)
        elif name.endswith("bn.weight"):
            value.uniform_(0.8, 1.2)
    return network.eval(), whole.eval()


def test_features_of_images_and_of_files(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_distance, "_BATCH", 3)
    network, whole = theirs
    save_tensors(tmp_path / "pt_inception-2015-12-05-6726825d.safetensors", _state(network))
    real, made = odd_images(0)[:3], odd_images(1)[:3]
    (tmp_path / "real").mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / "real" / f"{i}.png")
    resize = build_resizer("clean")
    expected = []
    for images in (real, made):
        pixels = np.stack([resize(image) for image in images])
        ours = np.concatenate([resize_float(image[None]) for image in images])
        np.testing.assert_array_equal(ours, pixels)
        with torch.no_grad():
            found = whole((tensor(pixels, images=True) - 128) / 128)[0]
        expected.append(array(found)[:, :, 0, 0].astype(np.float64))
    scorer = load_scorer("fid", str(tmp_path))
    prepared = np.concatenate([resize_float(image[None]) for image in made])
    found = feature_distance.features(scorer.extract, scorer.params, lambda x: x, prepared)
    assert found.shape == (3, 2048) and expected[1].std() > 1e-3
    assert relative(found, expected[1]) < 1e-5
    assert relative(scorer.mean, expected[0].mean(0)) < 1e-5
    assert relative(scorer.covariance, np.cov(expected[0], rowvar=False)) < 1e-4


def _state(network):
    """As the published file has it."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def test_published_size():
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(FIDInception().init, jax.random.key(0), images)["params"]
    with torch.device("meta"):
        theirs = torchvision.models.inception_v3(aux_logits=False, init_weights=False)
    kept = [v for k, v in theirs.state_dict().items() if not k.startswith("fc.")]
    count = sum(value.numel() for value in kept if value.ndim)  # but for the counters
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
