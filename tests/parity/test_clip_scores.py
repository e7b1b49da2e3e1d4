"""Scores made of CLIP's towers, against the packages that define them, on the same weights."""

import numpy as np
import pytest
from PIL import Image

reason = "parity with PyTorch needs torch, torchvision, transformers, open_clip and imscore"
torch = pytest.importorskip("torch", reason=reason)
torchvision = pytest.importorskip("torchvision", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
pytest.importorskip("open_clip", reason=reason)
pytest.importorskip("imscore", reason=reason)

from imscore.aesthetic.model import MLP, LAIONAestheticScorer  # noqa: E402
from imscore.hps.model import HPSv2, ResizeMaxSize  # noqa: E402
from open_clip.model import CLIP  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

from tests.support.odd_inputs import TEXTS, odd_images, write_clip_vocabulary  # noqa: E402
from tests.support.scorer_files import (  # noqa: E402
    open_clip_tensors,
    transformers_config,
    write_clip,
)
from tests.support.torch_networks import array, relative  # noqa: E402
from tlcm_jax.evaluation.scorers.table import load_scorer  # noqa: E402
from tlcm_jax.io import names  # noqa: E402
from tlcm_jax.io.files import save_tensors  # noqa: E402

SIDE = 56
RAW = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
normalise = torchvision.transforms.Compose(
    [
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        ),
    ]
)


@pytest.fixture(scope="module")
def images():
    return odd_images()


def _scores(scorer, images):
    """Ours, of each image with its own text."""
    return np.array(
        [
            scorer.values(image[None], [text], {})[scorer.name][0]
            for image, text in zip(images, TEXTS, strict=True)
        ]
    )


@pytest.mark.parametrize("name", ["hps", "hps_v21"])
def test_hps(name, images, tmp_path):
    config, params = write_clip(tmp_path, raw=RAW)
    write_clip_vocabulary(tmp_path / "tokenizer")
    file = {"hps": "HPS_v2_compressed", "hps_v21": "HPS_v2.1_compressed"}[name]
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / f"{file}.safetensors")
    theirs = HPSv2.__new__(HPSv2)  # its constructor fetches
    torch.nn.Module.__init__(theirs)
    theirs.model = CLIP(**RAW, output_dict=True).eval()
    tensors = {key: torch.from_numpy(v) for key, v in open_clip_tensors(params).items()}
    theirs.model.load_state_dict(tensors, strict=True)
    theirs.tokenizer = SimpleTokenizer()
    theirs._process = lambda x: x
    resize = ResizeMaxSize(SIDE)
    pixels = torch.stack([normalise(resize(Image.fromarray(image))) for image in images])
    with torch.no_grad():
        expected = 100 * array(theirs.score(pixels, list(TEXTS)))
    scorer = load_scorer(name, str(tmp_path), differentiable=True)
    assert relative(_scores(scorer, images), expected) < 1e-5
    other = {"hps": "hps_v21", "hps_v21": "hps"}[name]
    with pytest.raises(ValueError, match=f"is the file of score '{name}', and not of '{other}'"):
        load_scorer(other, str(tmp_path / f"{file}.safetensors"))


def test_pickscore(images, tmp_path):
    config, params = write_clip(tmp_path, dialect="transformers", raw=RAW)
    write_clip_vocabulary(tmp_path / "tokenizer")
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**transformers_config(config))).eval()
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in names.to_torch(params).items()})
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(list(TEXTS), padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = torch.stack([normalise(_as_the_processor(image)) for image in images])
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, **ids).logits_per_image.diagonal()
    scorer = load_scorer("pickscore", str(tmp_path), differentiable=True)
    assert relative(_scores(scorer, images), array(expected)) < 1e-5


def _as_the_processor(image):
    """Transformers' CLIPImageProcessor of version 4: Pillow's bicubic, a crop that rounds down."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(SIDE * width / short), int(SIDE * height / short))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return resized.crop((left, top, left + SIDE, top + SIDE))


def test_aesthetic(images, tmp_path):
    raw = {**RAW, "embed_dim": 768, "quick_gelu": True}
    config, params = write_clip(tmp_path / "clip", dialect="transformers", raw=raw)
    torch.manual_seed(0)
    theirs = LAIONAestheticScorer.__new__(LAIONAestheticScorer)  # its constructor fetches
    torch.nn.Module.__init__(theirs)
    settings = transformers.CLIPVisionConfig(**vars(config.vision), projection_dim=768)
    theirs.clip = transformers.CLIPVisionModelWithProjection(settings).eval()
    tensors = {k: torch.from_numpy(v) for k, v in names.to_torch(params).items()}
    wanted = {k for k in tensors if k.startswith(("vision_model.", "visual_projection."))}
    theirs.clip.load_state_dict({k: tensors[k] for k in wanted}, strict=True)
    theirs.mlp = MLP().eval()
    head = {k: v.numpy() for k, v in theirs.mlp.state_dict().items()}
    save_tensors(tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors", head)
    crop = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(SIDE, torchvision.transforms.InterpolationMode.BICUBIC),
            torchvision.transforms.CenterCrop(SIDE),
        ]
    )
    pixels = torch.stack([normalise(crop(Image.fromarray(image))) for image in images])
    with torch.no_grad():
        expected = array(theirs(pixels))
    scorer = load_scorer("aesthetic", str(tmp_path), differentiable=True)
    assert relative(_scores(scorer, images), expected) < 1e-5

    random = np.random.default_rng(1)
    linear = {"weight": random.normal(size=(1, 768)), "bias": np.array([2.5])}
    linear = {k: v.astype(np.float32) for k, v in linear.items()}
    save_tensors(tmp_path / "sa_0_4_vit_l_14_linear.safetensors", linear)
    with torch.no_grad():
        u = torch.nn.functional.normalize(theirs.clip(pixels).image_embeds, dim=-1)
    expected = array(u) @ linear["weight"][0] + 2.5
    first = load_scorer("aesthetic_v1", str(tmp_path), differentiable=True)
    assert relative(_scores(first, images), expected) < 1e-5
    with pytest.raises(ValueError, match="missing layers.0.weight"):
        load_scorer("aesthetic", str(tmp_path / "sa_0_4_vit_l_14_linear.safetensors"))
