"""The CLIP score from its files: through the table, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.scorer_files import OPEN_CLIP, write_clip
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.io.files import save_tensors

PROMPTS = ["a red cat", "an icon of " + "a red cat " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


def _images(size=(40, 31), n=2):
    return np.random.default_rng(0).integers(0, 256, (n, *size, 3), np.uint8)


def test_a_score_through_the_table(folder):
    scorer = load_scorer("clip", str(folder), differentiable=True)
    images = _images()
    values = scorer.values(images, PROMPTS, {})["clip"]
    assert values.shape == (2,) and np.all(np.abs(values) <= 100)
    # The same whatever the batch, and close to what the preference term sees.
    alone = [scorer.values(images[i : i + 1], [PROMPTS[i]], {})["clip"][0] for i in range(2)]
    np.testing.assert_allclose(values, alone, rtol=1e-6)
    traced = scorer.score(scorer.params, images.astype(np.float32) / 255, scorer.texts(PROMPTS))
    np.testing.assert_allclose(values, traced, atol=0.2)
    assert abs(float(values[0] - values[1])) > 0.1


def test_a_score_is_the_same_on_one_device(folder, monkeypatch):
    scorer, images = load_scorer("clip", str(folder)), _images(n=11)
    prompts = [f"a {'red ' * i}cat" for i in range(11)]
    assert len(jax.local_devices()) == 8
    together = scorer.values(images, prompts, {})["clip"]
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    alone = scorer.values(images, prompts, {})["clip"]
    np.testing.assert_allclose(together, alone, atol=1e-4)  # of 100


def test_a_prefix_is_before_every_text(folder):
    plain, prefixed = (load_scorer(name, str(folder)) for name in ("clip", "clip_prefixed"))
    written = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    np.testing.assert_array_equal(prefixed.texts(PROMPTS), plain.texts(written))
    assert prefixed.name == "clip_prefixed"


def test_half_precision_is_read_as_single(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    file = tmp_path / "half" / "open_clip_model.safetensors"
    save_tensors(file, {k: v.astype(np.float16) for k, v in load_file(file).items()})
    scorer, whole = load_scorer("clip", str(tmp_path / "half")), load_scorer("clip", str(folder))
    assert {leaf.dtype for leaf in jax.tree.leaves(scorer.params)} == {np.dtype(np.float32)}
    for leaf, other in zip(*(jax.tree.leaves(s.params) for s in (scorer, whole)), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-3)


def test_both_dialects_are_one_network(folder, tmp_path):
    write_clip(tmp_path, dialect="transformers")
    first, second = (load_scorer("clip", str(path)) for path in (folder, tmp_path))
    images = _images()
    np.testing.assert_array_equal(
        first.values(images, PROMPTS, {})["clip"], second.values(images, PROMPTS, {})["clip"]
    )


def test_what_is_missing_is_named_with_its_origin(folder, tmp_path):
    for path, message in (
        ("", r"'clip' are missing \(give --scores clip=PATH\).*laion/CLIP-ViT-g-14-laion2B-s12B"),
        (str(tmp_path / "none"), r"none in .*none\): fetch open_clip_model.safetensors"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_scorer("clip", path)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="open_clip_pytorch_model.bin is a pickle"):
        load_scorer("clip", str(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="tokenizer of score 'clip' is missing: put vocab"):
        load_scorer("clip", str(bare))


def test_another_network_is_refused_by_name(tmp_path):
    raw = json.loads(json.dumps(OPEN_CLIP))
    write_clip(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="holds a CLIP 32 and 16 wide.*1408 and 1024 wide"):
        load_scorer("clip", str(tmp_path))
    raw["text_cfg"]["layers"] = 3
    (tmp_path / "open_clip_config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="does not fit its config: missing transformer.resblocks"):
        load_scorer("clip", str(tmp_path))
    raw["vision_cfg"]["pool_type"] = "avg"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="this one sets pool_type"):
        load_scorer("clip", str(tmp_path))
    published = {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14,
        },
        "text_cfg": {"width": 1024, "heads": 16, "layers": 24},
    }  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match="is ViT-H-14, but score 'clip' is ViT-g-14's"):
        load_scorer("clip", str(tmp_path))
    save_tensors(tmp_path / "other.safetensors", {"weight": np.zeros(3, np.float32)})
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="holds no CLIP"):
        load_scorer("clip", str(tmp_path / "other.safetensors"))
