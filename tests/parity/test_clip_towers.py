"""CLIP's two towers against transformers on the same random weights."""

import numpy as np
import pytest

reason = "parity with PyTorch needs torch and transformers"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

import jax.numpy as jnp  # noqa: E402

from tests.support.scorer_files import transformers_config  # noqa: E402
from tests.support.tiny_pipeline import random_params  # noqa: E402
from tests.support.torch_networks import array, relative, tensor  # noqa: E402
from tlcm_jax.io import names  # noqa: E402
from tlcm_jax.io.clip_files import clip_shapes  # noqa: E402
from tlcm_jax.models.clip import CLIPConfig, CLIPModel  # noqa: E402

SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 56, "layers": 2, "width": 44, "head_width": 11, "mlp_ratio": 4.3637,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2,
    },
}  # fmt: skip


def test_the_towers():
    config = CLIPConfig.from_open_clip(SMALL)
    params = random_params(clip_shapes(config), np.random.default_rng(1))
    raw = transformers_config(config)
    assert CLIPConfig.from_transformers(raw) == config
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**raw)).eval()
    tensors = {key: torch.from_numpy(v) for key, v in names.to_torch(params).items()}
    theirs.load_state_dict(tensors, strict=True)
    pixels = np.random.default_rng(2).normal(size=(3, 56, 56, 3)).astype(np.float32)
    ids = np.random.default_rng(3).integers(1, 400, (3, 77))
    ids[:, 30] = 49407
    network = CLIPModel(config)
    with torch.no_grad():
        vision = theirs.vision_model(tensor(pixels, images=True))
        text = theirs.text_model(tensor(ids))
        expected = {
            "encode_image": theirs.visual_projection(vision.pooler_output),
            "image_tokens": theirs.visual_projection(vision.last_hidden_state),
            "encode_text": theirs.text_projection(text.pooler_output),
        }
        tokens = theirs.text_projection(text.last_hidden_state)
    for method, output in expected.items():
        given = jnp.asarray(ids if method == "encode_text" else pixels)
        ours = network.apply({"params": params}, given, method=method)
        assert relative(ours, array(output)) < 1e-5, method
    ours = network.apply({"params": params}, jnp.asarray(ids), method="text_tokens")
    assert relative(ours[0], array(tokens)) < 1e-5
    assert relative(ours[1], array(expected["encode_text"])) < 1e-5


@pytest.mark.parametrize("second", [None, {"num_hidden_layers": 3, "hidden_act": "gelu"}])
def test_a_config_is_read_as_transformers_reads_it(second):
    raw = {"model_type": "clip", "projection_dim": 20, "vision_config": {"hidden_size": 24}}
    raw |= {"text_config": {"hidden_size": 16, "num_hidden_layers": 2}, "text_config_dict": second}
    ours, theirs = CLIPConfig.from_transformers(raw), transformers.CLIPConfig.from_dict(dict(raw))
    for tower, other in ((ours.vision, theirs.vision_config), (ours.text, theirs.text_config)):
        for field in ("hidden_size", "num_hidden_layers", "hidden_act", "num_attention_heads"):
            assert getattr(tower, field) == getattr(other, field), field
    assert ours.projection_dim == theirs.projection_dim == 20
