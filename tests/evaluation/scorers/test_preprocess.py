"""What scorers make of images first: against torchvision, and host against device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.evaluation.scorers.preprocess import Preprocess

SIZES = ((61, 97), (57, 56), (133, 71), (301, 199), (97, 61), (1025, 767), (300, 224), (75, 57))


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (1, *size, 3), np.uint8) for size in SIZES]


def test_cropping_is_torchvisions(images):
    transforms = pytest.importorskip("torchvision.transforms", reason="the oracle is torchvision")
    from PIL import Image

    theirs = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
        ]
    )
    for image in images:
        expected = np.asarray(theirs(Image.fromarray(image[0])))
        np.testing.assert_array_equal(Preprocess().on_host(image)[0], expected)


def test_a_longest_side_and_black_around():
    wide = np.full((1, 50, 100, 3), 200, np.uint8)
    found = Preprocess(size=21, fit="pad").on_host(wide)[0]
    assert found.shape == (21, 21, 3)
    # 10 rows (10.5 rounds to even), 5 above them and 6 below.
    assert (found[5:15] == 200).all() and not found[:5].any() and not found[15:].any()


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_host_and_device_differ_by_rounding_alone(images, fit):
    preprocess = Preprocess(fit=fit)
    gaps = []
    for image in images:
        host = preprocess.on_host(image)
        device = preprocess.on_device(jnp.asarray(image, jnp.float32) / 255)
        assert host.shape == device.shape == (1, 224, 224, 3)
        gaps.append(np.abs(host - 255 * np.asarray(device)))
    print(f"{fit}: mean {np.mean(np.stack(gaps)):.2f}, most {np.max(np.stack(gaps)):.2f} of 255")
    assert np.max(np.stack(gaps)) < 1.2 and np.mean(np.stack(gaps)) < 0.4


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = np.random.default_rng(1).integers(0, 256, (1, 28, 28, 3), np.uint8)
    for fit in ("crop", "pad", "squash"):
        preprocess = Preprocess(size=28, fit=fit)
        np.testing.assert_array_equal(preprocess.on_host(image), image)
        scaled = jnp.asarray(image) / 255
        np.testing.assert_array_equal(preprocess.on_device(scaled), scaled)


def test_the_device_resizes_differentiably():
    preprocess = Preprocess(size=14)
    gradient = jax.grad(lambda x: jnp.sum(preprocess.pixels(x) ** 2))(jnp.full((1, 40, 20, 3), 0.4))
    # The rows that the crop cuts away do not count, but for those that reach into its edge.
    assert bool(jnp.all(gradient[:, 12:28] != 0)) and not gradient[:, :6].any()
