"""Frechet distances from their files: the real images, their statistics, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from tests.support.scorer_files import write_clip, write_dinov2, write_images, write_inception
from tlcm_jax.evaluation.scorers import feature_distance, frechet
from tlcm_jax.evaluation.scorers.frechet import Moments
from tlcm_jax.evaluation.scorers.table import load_scorer

WRITERS = {
    "fid": write_inception,
    "fd_dinov2": write_dinov2,
    "fd_clip": write_clip,
}


def _images(n=3, size=(310, 300)):
    return np.random.default_rng(1).integers(0, 256, (n, *size, 3), np.uint8)


@pytest.mark.parametrize("name", WRITERS)
def test_a_distance_to_real_images(name, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_distance, "_BATCH", 2)
    folder = tmp_path / name
    WRITERS[name](folder)
    write_images(folder / "real", size=(300, 305))
    scorer = load_scorer(name, str(folder))
    images = _images()
    values = scorer.values(images, ["a"] * 3, {})
    alone = [scorer.values(image[None], ["a"], {})["features"] for image in images]
    scale = np.abs(values["features"]).max()
    np.testing.assert_allclose(values["features"], np.concatenate(alone), atol=1e-6 * scale)
    own = Moments.of(values["features"])
    by_hand = frechet.gaussian_distance(own.mean, own.covariance, scorer.mean, scorer.covariance)
    assert scorer.summarise(values) == {name: pytest.approx(by_hand)} and by_hand > 0
    assert not scorer.measures[0].higher_is_better and not scorer.differentiable
    # The second time the statistics are read; other images have other ones.
    monkeypatch.setattr(feature_distance, "_read_image", None)
    again = load_scorer(name, str(folder))
    np.testing.assert_array_equal(again.mean, scorer.mean)
    monkeypatch.undo()
    if name == "fid":  # the next lines would compile it anew
        return
    (folder / "real" / "0.png").unlink()
    assert np.abs(load_scorer(name, str(folder)).mean - scorer.mean).max() > 0


def test_patches_are_cut_and_not_resized(tmp_path):
    write_inception(tmp_path / "patch")
    np.savez(tmp_path / "patch" / "real.npz", mu=np.zeros(128), sigma=np.eye(128))
    scorer = load_scorer("patch_fid", str(tmp_path / "patch"))
    images = _images(2)
    np.testing.assert_array_equal(scorer.prepare(images), images[:, 5:304, :299])


def test_dmd2_s_images_are_first_brought_to_512(tmp_path):
    write_inception(tmp_path / "512")
    np.savez(tmp_path / "512" / "real.npz", mu=np.zeros(128), sigma=np.eye(128))
    scorer = load_scorer("fid_512", str(tmp_path / "512"))
    images = _images(2)
    lanczos, bicubic = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
    expected = np.empty((2, 299, 299, 3), np.float32)
    for row, image in enumerate(images):
        smaller = np.asarray(Image.fromarray(image).resize((512, 512), lanczos), np.float32)
        for i in range(3):
            expected[row, ..., i] = Image.fromarray(smaller[..., i]).resize((299, 299), bicubic)
    np.testing.assert_array_equal(scorer.prepare(images), expected.clip(0, 255))


def test_stored_statistics(tmp_path):
    write_dinov2(tmp_path / "dino")
    with pytest.raises(
        FileNotFoundError, match=r"put them into .*real, a set's name into .*real.txt, or their"
    ):
        load_scorer("fd_dinov2", str(tmp_path / "dino"))
    stored = tmp_path / "dino" / "real.npz"
    np.savez(stored, mu=np.zeros(64), sigma=np.eye(64))
    scorer = load_scorer("fd_dinov2", str(tmp_path / "dino"))
    np.testing.assert_array_equal(scorer.covariance, np.eye(64))
    np.savez(stored, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="of 2048 features, and score 'fd_dinov2' has 64"):
        load_scorer("fd_dinov2", str(tmp_path / "dino"))
    np.savez(stored, mean=np.zeros(64))
    with pytest.raises(ValueError, match="holds no statistics, mu and sigma"):
        load_scorer("fd_dinov2", str(tmp_path / "dino"))


def test_real_images_of_a_named_set(tmp_path, monkeypatch):
    write_dinov2(tmp_path / "dino")
    images = _images(3)
    monkeypatch.setattr(
        feature_distance, "read_images", lambda name: iter(images) if name == "tfds:x@y" else None
    )
    (tmp_path / "dino/real.txt").write_text("tfds:x@y\n")
    scorer = load_scorer("fd_dinov2", str(tmp_path / "dino"))
    own = Moments.of(scorer.values(images, ["a"] * 3, {})["features"])
    np.testing.assert_allclose(scorer.mean, own.mean, rtol=1e-6)
    np.testing.assert_allclose(scorer.covariance, own.covariance, atol=1e-9)
    monkeypatch.setattr(feature_distance, "read_images", lambda name: iter(images[:1]))
    (tmp_path / "dino/real.txt").write_text("tfds:other@y")
    with pytest.raises(FileNotFoundError, match="the real images are 1; give at least 2"):
        load_scorer("fd_dinov2", str(tmp_path / "dino"))


def test_what_is_refused(tmp_path):
    write_dinov2(tmp_path / "dino")
    write_images(tmp_path / "dino" / "real")
    with pytest.raises(FileNotFoundError, match="fetch pt_inception.*mseitzer/pytorch-fid"):
        load_scorer("fid", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no Inception of the FID"):
        load_scorer("fid", str(tmp_path / "dino"))
    with pytest.raises(ValueError, match="holds no DINOv2: it has no embeddings.patch"):
        write_inception(tmp_path / "other")
        file = next((tmp_path / "other").glob("*.safetensors"))
        load_scorer("fd_dinov2", str(file))
    scorer = load_scorer("fd_dinov2", str(tmp_path / "dino"))
    with pytest.raises(ValueError, match="compares sets: give at least 2 prompts"):
        scorer.check(["one"], {})
    with pytest.raises(ValueError, match="at least 299 pixels, not 40x300"):
        feature_distance.middle(_images(size=(40, 300)))
    (tmp_path / "dino" / "real" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        load_scorer("fd_dinov2", str(tmp_path / "dino"))
