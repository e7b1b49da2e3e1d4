"""`sample --control`: what it draws, how it fits an image, and what it refuses."""

import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.controls import TINY_ADAPTER, tiny_controlnet, write_control
from tests.support.tiny_pipeline import SD_UNET, UNET, write_tiny_pipeline
from tlcm_jax import sample
from tlcm_jax.families.load import load_model
from tlcm_jax.generation import control as module
from tlcm_jax.generation.control import Control
from tlcm_jax.generation.generate import GenerationOptions, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    write_tiny_pipeline(folder / "tiny")
    write_control(folder / "canny", tiny_controlnet(UNET))
    write_control(folder / "of_sd", tiny_controlnet(SD_UNET))
    write_control(folder / "sketch", TINY_ADAPTER)
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8))
    wide.save(folder / "wide.png")
    wide.crop((8, 0, 40, 32)).save(folder / "square.png")
    (folder / "text.png").write_text("no picture")
    return folder


def run(folder, *words):
    values = flags.FlagValues()
    sample.define_flags(values)
    output = folder / "out.png"
    words = [str(folder / w[1:]) if w.startswith("/") else w for w in words]
    values(
        ["sample", "--model", f"{folder}/tiny", "--prompt=a cat", f"--output={output}",
         "--steps=2", *words]
    )  # fmt: skip
    sample.run(values)
    return np.asarray(Image.open(output))


def test_each_control_has_its_image_its_scale_and_its_steps(folder, capsys):
    drawn = run(
        folder, "--control", "/canny", "--control_image", "/wide.png",
        "--control", "/sketch", "--control_image", "/square.png",
        "--control_scale=0.5", "--control_scale=0.8", "--control_start=0", "--control_end=1",
        "--control_end=0.5",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert f"{folder}/wide.png: 48x32 pixels, of which the middle 32x32 are taken" in said
    assert f"{folder}/square.png\n" in said
    model = load_model(folder / "tiny")
    square = np.asarray(Image.open(folder / "square.png"))[None]
    controls = [
        Control(network=model.load_control(folder / "canny"), images=square, scale=0.5),
        Control(network=model.load_control(folder / "sketch"), images=square, scale=0.8, end=0.5),
    ]
    options = GenerationOptions(controls=controls)
    np.testing.assert_array_equal(drawn, generate(model, ["a cat"], 2, 0, options=options)[0])
    assert np.any(drawn != generate(model, ["a cat"], 2, 0)[0])


def test_edges_are_taken_at_the_size_that_is_drawn():
    cv2 = pytest.importorskip("cv2", reason="edges are taken by opencv-python-headless")
    square = np.zeros((64, 64, 3), np.uint8)
    square[16:48, 16:48] = 255

    fitted, said = module.fit_control(Image.fromarray(square), (32, 32), edges=True)
    assert said == "64x64 pixels scaled to 32x32, then its edges (canny)"
    small = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(fitted[0, ..., 0], cv2.Canny(small, 100, 200))
    # The square's four sides of 16 pixels.
    assert set(np.unique(fitted)) == {0, 255} and 50 < (fitted[0, ..., 0] > 0).sum() < 80
    assert module.fit_control(Image.fromarray(square), (32, 32), 1)[0].shape == (1, 32, 32, 1)


CANNY = ("--control", "/canny", "--control_image", "/square.png")


def test_a_picture_that_is_drawn_on_is_steered_too(folder):
    words = ("--image", "/square.png", "--strength=0.5")
    assert np.any(run(folder, *words, *CANNY) != run(folder, *words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (CANNY[:2], "1 --control and 0 --control_image: give an image for each"),
        (CANNY[2:], "0 --control and 1 --control_image: give an image for each"),
        ((*CANNY, *CANNY[2:]), "1 --control and 2 --control_image"),
        (("--control_scale=1",), "--control_scale goes with --control PATH"),
        ((*CANNY, "--control_scale=3"), "control scale 3: must lie in 0 to 2"),
        ((*CANNY, "--control_scale=1", "--control_scale=1"), "2 --control_scale for 1 --control"),
        ((*CANNY, "--control_start=0.5", "--control_end=0.2"), "a control from 0.5 to 0.2"),
        ((*CANNY, "--control_end=0.2"), "from 0 to 0.2 steers none of 2 steps"),
        ((*CANNY, "--upscale=2"), "--control is for one size"),
        ((*CANNY[:3], "/no.png"), "there is no such picture"),
        ((*CANNY[:3], "/text.png"), "cannot be read as a picture"),
        (("--control", "/no", *CANNY[2:]), "no such file, folder or hub id"),
        (("--control", "/of_sd", *CANNY[2:]), "a ControlNet of another family than the model"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder, words, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        run(folder, *words)
    assert "\n" not in str(error.value)


def test_edges_without_their_library_are_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tlcm_jax\[control\]'"):
        run(folder, *CANNY[:3], f"canny:{folder}/square.png")
