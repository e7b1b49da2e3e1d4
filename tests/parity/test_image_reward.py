"""ImageReward against the package that holds it, on the same random weights."""

import jax
import numpy as np
import pytest
from PIL import Image

reason = "parity with PyTorch needs torch, torchvision, timm, transformers and imscore"
torch = pytest.importorskip("torch", reason=reason)
transforms = pytest.importorskip("torchvision.transforms", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
pytest.importorskip("timm", reason=reason)
pytest.importorskip("imscore", reason=reason)

from imscore.imreward.bert import BertModel  # noqa: E402
from imscore.imreward.model import BLIP, MLP, ImageReward  # noqa: E402
from imscore.imreward.vit import VisionTransformer  # noqa: E402

from tests.support.odd_inputs import TEXTS, odd_images  # noqa: E402
from tests.support.scorer_files import write_image_reward  # noqa: E402
from tests.support.torch_networks import array, relative  # noqa: E402
from tlcm_jax.evaluation.scorers.table import load_scorer  # noqa: E402
from tlcm_jax.io.files import save_tensors  # noqa: E402
from tlcm_jax.models.blip import BLIPConfig, ImageRewardModel  # noqa: E402

SIDE, WIDTH, TEXT = 48, 128, 64


def _bert(words, width, layers, heads, inner):
    return transformers.BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, pad_token_id=0, layer_norm_eps=1e-12, encoder_width=WIDTH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "image_reward"
    write_image_reward(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """The package's model, small, random; its constructors fetch and have the published sizes."""
    torch.manual_seed(0)
    model, blip = ImageReward.__new__(ImageReward), BLIP.__new__(BLIP)
    for module in (model, blip):
        torch.nn.Module.__init__(module)
    words = len((folder / "vocab.txt").read_text().split())
    blip.visual_encoder = VisionTransformer(SIDE, 16, embed_dim=WIDTH, depth=2, num_heads=2)
    blip.text_encoder = BertModel(_bert(words, TEXT, 2, 1, 96))
    blip.vision_proj, blip.text_proj = torch.nn.Linear(WIDTH, 8), torch.nn.Linear(TEXT, 8)
    blip.tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
    model.blip, model.mlp = blip, MLP(TEXT)
    model.preprocess = lambda pixels: pixels
    model.mean, model.std = 0.16717362830052426, 1.0333394966054072
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    # Small where the first norms see it, so that what they add to a variance counts.
    vision, text = blip.visual_encoder, blip.text_encoder.embeddings
    for parameter in (*vision.patch_embed.parameters(), vision.cls_token, vision.pos_embed):
        parameter.data *= 1e-3
    for table in (text.word_embeddings, text.position_embeddings):
        table.weight.data *= 1e-5
    return model.eval().requires_grad_(False)


def test_rewards(theirs, folder):
    tensors = {k: v.contiguous().numpy() for k, v in theirs.state_dict().items()}
    save_tensors(folder / "ImageReward.safetensors", tensors)
    scorer = load_scorer("image_reward", str(folder), differentiable=True)
    transform = transforms.Compose(
        [
            transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(scorer.preprocess.mean, scorer.preprocess.std),
        ]
    )
    images = odd_images()
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    expected = array(theirs.score(pixels, list(TEXTS)))[:, 0]
    found = [
        scorer.values(image[None], [text], {})["image_reward"][0]
        for image, text in zip(images, TEXTS, strict=True)
    ]
    assert relative(np.array(found), expected) < 1e-5
    assert np.ptp(expected) > 1e-3
    np.testing.assert_array_equal(scorer.texts(["Cat"])["ids"][0, :6], [2, 7, 31, 50, 3, 0])
    assert scorer.texts(TEXTS)["seen"].sum(1).max() == 35  # the longest is cut


def test_published_sizes():
    blip = BLIPConfig()
    inputs = (
        jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32),
        jax.ShapeDtypeStruct((1, 35), np.int32),
        jax.ShapeDtypeStruct((1, 35), bool),
    )
    shapes = jax.eval_shape(ImageRewardModel(blip).init, jax.random.key(0), *inputs)["params"]
    with torch.device("meta"):
        vision = VisionTransformer(224, 16, embed_dim=1024, depth=24, num_heads=16)
        config = _bert(30524, 768, 12, 12, 3072)
        config.encoder_width = 1024
        modules = (vision, BertModel(config), MLP(768))
    theirs = sum(p.numel() for module in modules for p in module.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs


def test_what_is_missing_or_wrong_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="'image_reward' are missing.*THUDM/ImageReward"):
        load_scorer("image_reward", str(tmp_path))
    save_tensors(tmp_path / "ImageReward.safetensors", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="'blip.visual_encoder.* is missing"):
        load_scorer("image_reward", str(tmp_path))
    (tmp_path / "ImageReward.safetensors").write_bytes(
        (folder / "ImageReward.safetensors").read_bytes()
    )
    with pytest.raises(FileNotFoundError, match="put vocab.txt of bert-base-uncased"):
        load_scorer("image_reward", str(tmp_path))
