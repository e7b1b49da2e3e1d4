"""Chinese-CLIP's text tower and PEA-Diffusion's adapter against PyTorch on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and transformers"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

from tests.support.torch_networks import array, relative, tensor, twins  # noqa: E402
from tlcm_jax.models.chinese_clip import (  # noqa: E402
    ChineseCLIPTextConfig,
    ChineseCLIPTextModel,
)
from tlcm_jax.models.text_adapter import TextAdapter, TextAdapterConfig  # noqa: E402

# Chinese-CLIP ViT-H/14's, shrunk.
CONFIG = {
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 20,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 60,
}
IDS = np.array([[2, 7, 8, 9, 3, 0, 0], [2, 3, 0, 0, 0, 0, 0], [2, 4, 5, 6, 7, 8, 3]], np.int32)


def test_the_tower_is_transformers_():
    whole = transformers.ChineseCLIPConfig(
        text_config=CONFIG,
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 1, "image_size": 8, "patch_size": 4,
        },
    )  # fmt: skip
    theirs = transformers.ChineseCLIPModel(whole).text_model
    ours = ChineseCLIPTextModel(ChineseCLIPTextConfig.from_dict(whole.to_dict()))
    params = twins(ours, theirs)
    states = ours.apply({"params": params}, jnp.asarray(IDS))
    ids = tensor(IDS.astype(np.int64))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert relative(states, array(expected)) < 1e-5
    # Padding changes nothing of what stands before it.
    alone = ours.apply({"params": params}, jnp.asarray(IDS[:1, :5]))
    np.testing.assert_allclose(states[:1, :5], alone, rtol=1e-4, atol=1e-5)


def test_the_adapter_is_three_linears_and_a_head():
    """PyTorch's modules in the order that the equations give."""

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linear, gelu = torch.nn.Linear, torch.nn.GELU
            self.layernorm = torch.nn.LayerNorm(32)
            self.projector = torch.nn.Sequential(
                linear(32, 48, bias=False), gelu(), linear(48, 48, bias=False), gelu(),
                linear(48, 20, bias=False),
            )  # fmt: skip
            self.fc = linear(20, 40)

        def forward(self, x):
            h = self.projector(self.layernorm(x))
            return self.fc(torch.nn.functional.gelu(h)), h.mean(1)

    theirs = Theirs()
    config = TextAdapterConfig(in_width=32, hidden_width=48, pooled_width=20, sequence_width=40)
    ours = TextAdapter(config)
    params = twins(ours, theirs)
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))
    with torch.no_grad():
        expected = theirs(tensor(x))
    for found, other in zip(ours.apply({"params": params}, x), expected, strict=True):
        assert relative(found, array(other)) < 1e-5


def test_what_is_not_implemented_is_named():
    with pytest.raises(ValueError, match="model_type='clip' is not Chinese-CLIP's"):
        ChineseCLIPTextConfig.from_dict({"model_type": "clip"})
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        ChineseCLIPTextConfig.from_dict(CONFIG | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        ChineseCLIPTextConfig.from_dict(CONFIG | {"num_attention_heads": 5})
