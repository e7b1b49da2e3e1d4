"""MPS against the package that holds it, on the same random weights, an image at a time."""

import dataclasses

import jax
import numpy as np
import pytest

reason = "parity with PyTorch needs torch, torchvision, transformers, open_clip and imscore"
torch = pytest.importorskip("torch", reason=reason)
pytest.importorskip("torchvision", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
pytest.importorskip("open_clip", reason=reason)
pytest.importorskip("imscore", reason=reason)

from imscore.mps.cross import CrossModel  # noqa: E402
from imscore.mps.model import MPS, CLIPModel, XCLIPModel  # noqa: E402

from tests.support.odd_inputs import TEXTS, odd_images, write_clip_vocabulary  # noqa: E402
from tests.support.scorer_files import transformers_config  # noqa: E402
from tests.support.torch_networks import relative  # noqa: E402
from tlcm_jax.evaluation.scorers import mps  # noqa: E402
from tlcm_jax.evaluation.scorers.table import load_scorer  # noqa: E402
from tlcm_jax.io.files import save_tensors  # noqa: E402
from tlcm_jax.io.json_files import write_json  # noqa: E402
from tlcm_jax.models import mps as network  # noqa: E402
from tlcm_jax.models.clip import ARCHITECTURES, CLIPConfig  # noqa: E402
from tlcm_jax.models.mps import MPSModel  # noqa: E402

SIDE, WIDTH = 56, 24
RAW = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The package's model with random weights; its constructors would fetch the published ones."""
    torch.manual_seed(0)
    model = MPS.__new__(MPS)
    torch.nn.Module.__init__(model)
    model.mps = CLIPModel.__new__(CLIPModel)
    torch.nn.Module.__init__(model.mps)
    raw = transformers_config(CLIPConfig.from_open_clip(RAW))
    model.mps.model = XCLIPModel(transformers.CLIPConfig(**raw))
    model.mps.cross_model = CrossModel(dim=WIDTH, layer_num=2, heads=3, dim_head=8)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    # Few directions among the condition's tokens, so that some words match none.
    tower = model.mps.model.text_model
    tower.embeddings.position_embedding.weight.data *= 0.1
    tower.embeddings.token_embedding.weight.data *= 5
    tower.final_layer_norm.bias.data.zero_()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def scorer(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mps")
    tensors = {key: value.numpy() for key, value in theirs.state_dict().items()}
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", transformers_config(CLIPConfig.from_open_clip(RAW)))
    write_clip_vocabulary(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mps, "CONDITION", "things")  # which some words do not match
        yield load_scorer("mps", str(folder), differentiable=True)


def test_scores_one_at_a_time(theirs, scorer):
    images = odd_images()
    found, expected = [], []
    condition = torch.from_numpy(np.array(scorer.texts(["things"]), np.int64))
    masked = 0
    for image, text in zip(images, TEXTS, strict=True):
        host = scorer.preprocess.on_host(image[None])
        pixels = scorer.preprocess.pixels(host.astype(np.float32) / 255)
        pixels = torch.from_numpy(np.moveaxis(np.asarray(pixels), -1, 1).copy())
        ids = torch.from_numpy(scorer.texts([text]).astype(np.int64))
        # The package halves the images and the mask's precision; the weights here are of 32 bits.
        pixels.half = lambda pixels=pixels: pixels
        words, _ = theirs.mps.get_text_features(ids)
        about, _ = theirs.mps.get_text_features(condition)
        match = (words @ about.transpose(1, 2)).amax(-1)
        masked += int((match / match.max() <= 0.01).sum())
        end, crossed = theirs.mps(ids, pixels, condition)
        cosine = torch.nn.functional.cosine_similarity(end, crossed)
        expected.append(float(theirs.mps.logit_scale.exp() * cosine))
        found.append(scorer.values(image[None], [text], {})["mps"][0])
    assert masked > 0  # else the mask could be left out
    assert relative(np.array(found), np.array(expected)) < 1e-5


def test_published_size():
    config = ARCHITECTURES["ViT-H-14"]
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, 224, 224, 3), np.float32), *[((1, 77), np.int32)] * 2)
    ]
    shapes = jax.eval_shape(MPSModel(config).init, jax.random.key(0), *inputs)["params"]
    with torch.device("meta"):
        tower = XCLIPModel(transformers.CLIPConfig(**transformers_config(config)))
        modules = (tower, CrossModel(dim=1024, layer_num=4, heads=16))
    theirs = sum(p.numel() for module in modules for p in module.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs


def test_a_score_does_not_depend_on_the_batch(scorer, monkeypatch):
    # A mask that cuts more, so that another maximum would be another mask.
    monkeypatch.setattr(network, "_SEEN", 0.7)
    scorer = dataclasses.replace(scorer)  # compiled anew
    images = np.concatenate([scorer.preprocess.on_host(image[None]) for image in odd_images()])
    together = scorer.values(images, TEXTS, {})["mps"]
    alone = [scorer.values(images[i : i + 1], [TEXTS[i]], {})["mps"][0] for i in range(len(TEXTS))]
    np.testing.assert_allclose(together, alone, rtol=2e-6)


def test_the_gradient_reaches_the_image(scorer):
    images = jax.random.uniform(jax.random.key(0), (2, 60, 64, 3))
    texts = scorer.texts(TEXTS[:2])
    gradient = jax.jit(jax.grad(lambda x: scorer.score(scorer.params, x, texts).sum()))(images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_what_is_no_mps_is_refused(scorer, tmp_path):
    assert scorer.threshold == 16 and dataclasses.is_dataclass(scorer)
    save_tensors(tmp_path / "model.safetensors", {"logit_scale": np.zeros((), np.float32)})
    with pytest.raises(ValueError, match="holds no MPS"):
        load_scorer("mps", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'mps' are missing.*RE-N-Y/mpsv1"):
        load_scorer("mps", str(tmp_path / "none"))
