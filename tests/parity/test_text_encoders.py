"""CLIP's text towers, shrunk, against transformers on the same random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

reason = "parity with PyTorch needs torch and transformers"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

from tests.support.published import TEXT, TEXT_2  # noqa: E402
from tests.support.torch_networks import array, relative, tensor, twins  # noqa: E402
from tlcm_jax.models.clip_text import CLIPTextConfig, CLIPTextModel  # noqa: E402

END = 59  # the largest id, as end-of-text is in CLIP's vocabulary
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 24,
    "vocab_size": END + 1,
}
# CLIP-L and OpenCLIP's bigG as SDXL has them, and OpenCLIP's H as SD 2.x has it (23 of 24 layers).
TOWERS = {"clip-l": TEXT, "bigg": TEXT_2, "sd-2.1": TEXT | {"hidden_act": "gelu"}}
# Begin, text and end, then padding: by end-of-text (CLIP-L), by "!" = 0 (OpenCLIP), or none.
IDS = np.array(
    [
        [58, 7, 8, 9, 10, END, END, END, END],
        [58, 7, 8, 9, 10, END, 0, 0, 0],
        [58, END, 0, 0, 0, 0, 0, 0, 0],
        [58, 1, 2, 3, 4, 5, 6, 7, END],
    ],
    np.int32,
)


@pytest.mark.parametrize("end", [2, END], ids=["legacy-eos", "real-eos"])
@pytest.mark.parametrize("name", TOWERS)
def test_tower(name, end):
    config = TOWERS[name] | SMALL | {"eos_token_id": end}
    ours = CLIPTextModel(CLIPTextConfig.from_dict(config))
    projected = ours.config.projection_dim is not None
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    theirs = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    # In memory transformers drops the prefix that the files have; not where there is a projection.
    params = twins(ours, theirs, prefix="" if projected else "text_model.")
    states, last, pooled = ours.apply({"params": params}, jnp.asarray(IDS))
    with torch.no_grad():
        expected = theirs(tensor(IDS.astype(np.int64)), output_hidden_states=True)
    assert len(states) == len(expected.hidden_states) == 4
    for state, other in zip(states, expected.hidden_states, strict=True):
        assert relative(state, array(other)) < 1e-5
    assert relative(last, array(expected.last_hidden_state)) < 1e-5
    theirs_pooled = expected.text_embeds if projected else expected.pooler_output
    assert relative(pooled, array(theirs_pooled)) < 1e-5
    # What comes after the end of the text does not reach the pooled output; what it is does
    # reach the states of the padding.
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=1e-5)
    assert relative(last[0], last[1]) > 0.1
