"""CLIP's towers and its score against open_clip on the same random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

reason = "parity with PyTorch needs torch, transformers and open_clip (with torchvision)"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
pytest.importorskip("torchvision", reason=reason)
open_clip = pytest.importorskip("open_clip", reason=reason)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from open_clip.model import CLIP  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402

from tests.support.odd_inputs import TEXTS, odd_images, write_clip_vocabulary  # noqa: E402
from tests.support.scorer_files import open_clip_tensors  # noqa: E402
from tests.support.tiny_pipeline import random_params  # noqa: E402
from tests.support.torch_networks import array, relative  # noqa: E402
from tlcm_jax.data.tokens import open_clip_ids  # noqa: E402
from tlcm_jax.evaluation.scorers.clip import CLIPScorer  # noqa: E402
from tlcm_jax.evaluation.scorers.preprocess import Preprocess  # noqa: E402
from tlcm_jax.io.clip_files import clip_shapes  # noqa: E402
from tlcm_jax.models.clip import ARCHITECTURES, CLIPConfig, CLIPModel  # noqa: E402

# ViT-g's head and MLP ratio, for both are odd there.
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 56, "layers": 2, "width": 44, "head_width": 11, "mlp_ratio": 4.3637,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return odd_images()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_clip_vocabulary(tmp_path_factory.mktemp("vocabulary"))
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def test_token_ids_are_open_clips(tokenizer):
    ours = open_clip_ids(tokenizer, TEXTS, 77)
    theirs = open_clip.tokenizer.SimpleTokenizer()(list(TEXTS))
    np.testing.assert_array_equal(ours, array(theirs))
    assert ours[-1, -1] == 49407 and ours[0, 3:].max() == 0  # cut, and padded


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quickgelu"])
def test_the_score_is_open_clips(quick, images, tokenizer):
    raw = {**SMALL, "quick_gelu": quick}
    config = CLIPConfig.from_open_clip(raw)
    params = random_params(clip_shapes(config), np.random.default_rng(0))
    theirs = CLIP(**raw).eval()
    tensors = {key: torch.from_numpy(v.copy()) for key, v in open_clip_tensors(params).items()}
    theirs.load_state_dict(tensors, strict=True)
    transform = image_transform(56, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        u, v, scale = theirs(pixels, open_clip.tokenizer.SimpleTokenizer()(list(TEXTS)))
    ours = CLIPScorer(
        name="clip",
        network=CLIPModel(config),
        params=params,
        tokenizer=tokenizer,
        preprocess=Preprocess(size=56),
    )
    host = np.concatenate([ours.preprocess.on_host(image[None]) for image in images])
    outputs = ours.network.apply(
        {"params": params},
        ours.preprocess.pixels(jnp.asarray(host, jnp.float32) / 255),
        jnp.asarray(ours.texts(TEXTS)),
    )
    for ours_, theirs_ in zip(outputs, (u, v, scale), strict=True):
        assert relative(ours_, array(theirs_)) < 1e-5
    scores = [
        ours.values(image[None], [text], {})["clip"][0]
        for image, text in zip(images, TEXTS, strict=True)
    ]
    assert relative(np.array(scores), 100 * array((u * v).sum(-1))) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_sizes(name):
    folder = Path(open_clip.__file__).parent / "model_configs"
    raw = json.loads((folder / f"{name}.json").read_text())
    assert CLIPConfig.from_open_clip(raw) == ARCHITECTURES[name]
    with torch.device("meta"):
        theirs = CLIP(**raw)
    ours = sum(leaf.size for leaf in jax.tree.leaves(clip_shapes(ARCHITECTURES[name])))
    assert ours == sum(p.numel() for p in theirs.parameters())
