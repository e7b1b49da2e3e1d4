"""The loader that docs/applications.md gives for PyTorch makes what `sample --adapter` draws by."""

import re

import numpy as np
import pytest

reason = "parity with PyTorch needs torch and transformers"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

from tests.families.test_text_adapter import TEXT, write_adapter  # noqa: E402
from tests.support.tiny_pipeline import write_tiny_pipeline  # noqa: E402
from tests.support.torch_networks import relative  # noqa: E402
from tlcm_jax import paths  # noqa: E402
from tlcm_jax.families.load import load_model  # noqa: E402
from tlcm_jax.io import names  # noqa: E402


def test_the_snippet_s_embeddings_are_ours(tmp_path, monkeypatch):
    model = load_model(write_tiny_pipeline(tmp_path / "tiny"))
    _, _, (params, _) = write_adapter(tmp_path / "zh")
    found = model.with_text_adapter(tmp_path / "zh")
    (ids,) = found.tokenize(["一只红色的猫", "猫"])
    ours = found.encode(["一只红色的猫", "猫"])

    config = transformers.ChineseCLIPTextConfig(**TEXT)
    tower = transformers.ChineseCLIPTextModel(config, add_pooling_layer=False).eval()
    tensors = {name: torch.from_numpy(np.array(v)) for name, v in names.to_torch(params).items()}
    missing = tower.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    ids = torch.from_numpy(ids).long()
    with torch.no_grad():
        states = tower(ids, attention_mask=(ids != 0).long()).last_hidden_state

    text = (paths.ROOT / "docs" / "applications.md").read_text(encoding="utf-8")
    (snippet,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "load_file" in block
    )
    monkeypatch.chdir(tmp_path / "zh")
    scope = {"states": states}
    exec(snippet, scope)  # our own document
    assert relative(ours.prompt_embeds, scope["prompt_embeds"]) < 1e-5
    assert relative(ours.pooled, scope["pooled_prompt_embeds"]) < 1e-5
