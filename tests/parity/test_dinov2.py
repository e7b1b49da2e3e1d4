"""DINOv2 against transformers on the same random weights, and its interpolated positions."""

import jax
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and transformers"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

from tests.support.tiny_pipeline import random_params  # noqa: E402
from tests.support.torch_networks import array, relative, tensor  # noqa: E402
from tlcm_jax.io import names  # noqa: E402
from tlcm_jax.io.files import save_tensors  # noqa: E402
from tlcm_jax.models.dinov2 import DINOv2, DINOv2Config, bicubic_weights  # noqa: E402


def _shapes(config, side):
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    return jax.eval_shape(DINOv2(config).init, jax.random.key(0), pixels)["params"]


@pytest.mark.parametrize("side", [70, 42])  # as trained, and interpolated
def test_the_class_token(side, tmp_path):
    config = DINOv2Config(hidden_size=128, num_hidden_layers=2, trained_grid=5, offset=0.0)
    params = random_params(_shapes(config, side), np.random.default_rng(0))
    raw = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    raw.save_pretrained(tmp_path)
    mask = {"embeddings.mask_token": np.zeros((1, 128), np.float32)}
    # Through a file: in memory transformers has names of its own.
    save_tensors(tmp_path / "model.safetensors", names.to_torch(params) | mask)
    theirs, info = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    pixels = np.random.default_rng(1).normal(size=(3, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(tensor(pixels, images=True)).pooler_output
    ours = jax.jit(DINOv2(config).apply)({"params": params}, pixels)
    assert relative(ours, array(expected)) < 1e-5


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_are_interpolated_as_by_pytorch(offset):
    grid = np.random.default_rng(0).normal(size=(37, 37, 3)).astype(np.float32)
    choice = {"size": (16, 16)} if not offset else {"scale_factor": ((16 + offset) / 37,) * 2}
    expected = torch.nn.functional.interpolate(
        tensor(grid[None], images=True), mode="bicubic", align_corners=False, **choice
    )
    weights = bicubic_weights(37, 16, offset)
    ours = np.einsum("ih,jw,hwd->ijd", weights, weights, grid)
    assert relative(ours, array(expected, images=True)[0]) < 1e-5


def test_published_size():
    leaves = jax.tree.leaves(_shapes(DINOv2Config(), 224))
    with torch.device("meta"):
        theirs = transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518,
                patch_size=14,
            )
        )  # fmt: skip
    unused = theirs.embeddings.mask_token.numel()
    assert sum(x.size for x in leaves) == sum(p.numel() for p in theirs.parameters()) - unused
