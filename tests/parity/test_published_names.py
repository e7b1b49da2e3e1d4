"""The names and shapes of the published networks, at full size, against their own libraries.

Nothing is allocated: PyTorch's networks are made on the meta device, ours are traced.
"""

import json

import flax.traverse_util
import pytest

reason = "parity with PyTorch needs torch, diffusers and transformers"
torch = pytest.importorskip("torch", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

from tests.support.families import UNETS  # noqa: E402
from tests.support.published import write_sdxl_configs  # noqa: E402
from tlcm_jax.families.base import abstract_params  # noqa: E402
from tlcm_jax.families.load import abstract_model  # noqa: E402
from tlcm_jax.io import names  # noqa: E402
from tlcm_jax.models.unet import UNet2DConditionModel  # noqa: E402
from tlcm_jax.models.unet_config import UNetConfig  # noqa: E402


def ours(tree):
    """Checkpoint name to shape, in the checkpoint's layout."""
    shapes = {}
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        shape = leaf.shape
        if path[-1] == "kernel":
            shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        shapes[names.torch_key(path)] = shape
    return shapes


def theirs(make, prefix=""):
    with torch.device("meta"):
        module = make()
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def text_encoder(kind):
    return lambda config: getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sdxl_configs(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize(
    ("component", "make", "prefix"),
    [
        ("unet", diffusers.UNet2DConditionModel.from_config, ""),
        ("vae", diffusers.AutoencoderKL.from_config, ""),
        # In memory transformers leaves out the prefix that the files have.
        ("text_encoder", text_encoder("CLIPTextModel"), "text_model."),
        ("text_encoder_2", text_encoder("CLIPTextModelWithProjection"), ""),
    ],
)
def test_sdxl(folder, component, make, prefix):
    config = json.loads((folder / component / "config.json").read_text())
    expected = theirs(lambda: make(config), prefix)
    assert ours(abstract_model(folder).params[component]) == expected


# Parameters as their model cards give them, and to what.
SIZES = {
    "sd-1.5": (860, 1e6),
    "sd-2.1": (866, 1e6),
    "ssd-1b": (1.3, 1e9),
    "segmind-vega": (745, 1e6),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", UNETS)
def test_unet_of_every_family(family):
    config = UNETS[family]
    shapes = ours(abstract_params(UNet2DConditionModel(UNetConfig.from_dict(config))))
    expected = theirs(lambda: diffusers.UNet2DConditionModel.from_config(config))
    assert shapes == expected
    if family in SIZES:
        published, unit = SIZES[family]
        size = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert abs(size / unit - published) < (0.05 if unit == 1e9 else 1)
