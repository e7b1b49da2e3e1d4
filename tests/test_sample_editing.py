"""`sample` on pictures: what it writes, what it says, and what it refuses before it loads."""

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import sample
from tlcm_jax.families.load import load_model
from tlcm_jax.generation.canvas import fit, read_picture, read_pictures
from tlcm_jax.generation.generate import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8))
    picture.save(tmp_path / "wide.png")
    picture.crop((8, 0, 40, 32)).save(tmp_path / "square.png")
    for name, box in (("top", (0, 0, 32, 16)), ("black", (0, 0, 0, 0))):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def run(model, folder, *words):
    values = flags.FlagValues()
    sample.define_flags(values)
    output = folder / "out.png"
    values(["sample", "--model", str(model), "--prompt", "a cat", "--output", str(output), *words])
    sample.run(values)
    return np.asarray(Image.open(output)).astype(int)


def test_a_picture_is_fitted_and_changed_and_it_is_said(model, files, capsys):
    drawn = run(model, files, "--image", f"{files}/wide.png", "--strength", "0.3", "--steps", "2")
    said = capsys.readouterr().out
    assert "48x32 pixels, of which the middle 32x32 are taken" in said
    assert "strength 0.3, snapped to the student's 0.25, is 2 steps, at 249, 124" in said
    square = run(model, files, "--image", f"{files}/square.png", "--strength", "0.3", "--steps=2")
    np.testing.assert_array_equal(drawn, square)
    whole = run(model, files, "--image", f"{files}/square.png", "--strength", "1", "--steps=2")
    assert np.mean(whole != square) > 0.5


def test_images_need_not_be_square(model, files, capsys):
    image = ("--image", f"{files}/square.png", "--resolution=48x32", "--steps=1")
    assert run(model, files, *image).shape == (32, 48, 3)
    fitted = "32x32 pixels scaled to 48x48, of which the middle 48x32 are taken"
    assert fitted in capsys.readouterr().out


def test_a_mask_keeps_what_is_black(model, files):
    """The decoder sees beyond its latent, so what is kept is compared far from the mask."""
    image = ("--image", f"{files}/square.png", "--steps=1")
    drawn = run(model, files, *image, "--mask", f"{files}/top.png")
    other = run(model, files, *image, "--mask", f"{files}/top.png", "--seed=5")
    changed = np.abs(drawn - other).mean(axis=(1, 2))
    assert changed[:12].min() > 4 * changed[-4:].max()


def test_two_stages_draw_small_and_then_large(model, files, capsys):
    drawn = run(model, files, "--upscale=1.5", "--steps=1", "--seed=7")
    assert drawn.shape == (48, 48, 3)
    assert "at 48x48 pixels: strength 0.375 is 1 step, at 374" in capsys.readouterr().out
    small = generate(load_model(model), ["a cat"], 1, seed=7)[0]
    larger = np.asarray(Image.fromarray(small).resize((48, 48), Image.Resampling.LANCZOS))
    assert np.mean(drawn != larger) > 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mask", "top.png"], "--mask goes with --image"),
        (["--strength", "0.5"], "--strength goes with --image FILE or --upscale"),
        (["--image", "square.png", "--strength", "1.5"], "strength = 1.5: must lie above 0"),
        (["--image", "square.png", "--strength", "0"], "strength = 0: must lie above 0"),
        (["--image", "square.png", "--teacher"], "leave out --teacher"),
        (["--image", "square.png", "--upscale", "2"], "larger --resolution"),
        (["--upscale", "1"], "--upscale 1: must lie above 1"),
        (["--image", "nothing.png"], "there is no such picture"),
        (["--image", "text.png"], "cannot be read as a picture"),
        (["--image", "wide.png", "--mask", "top.png"], "has 32x32 pixels and the picture 48x32"),
        (["--image", "square.png", "--mask", "black.png"], "has nothing white"),
    ],
)
def test_what_does_not_go_together_is_refused_before_loading(files, words, said):
    words = [f"{files}/{word}" if word.endswith(".png") else word for word in words]
    with pytest.raises((ValueError, OSError), match=said) as caught:
        run("no/such/model", files, *words)
    assert "\n" not in str(caught.value)


def test_an_inpainting_model_wants_a_mask(files, tmp_path):
    model = write_tiny_pipeline(tmp_path / "tiny", family="sdxl-inpaint")
    for words in ([], ["--teacher"], ["--image", f"{files}/square.png"]):
        with pytest.raises(ValueError, match="inpainting model: it needs a picture and a mask"):
            run(model, files, *words)
    with pytest.raises(ValueError, match="distil its text-to-image model"):
        load_model(model).check_teacher()


def test_pictures_are_read_upright_and_on_white(tmp_path):
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert np.all(np.asarray(read_picture(tmp_path / "clear.png")) == 255)
    turned = Image.new("RGB", (3, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_pictures(tmp_path / "turned.jpg", None)[0].size == (2, 3)


def test_fitting_covers_and_cuts_the_middle():
    picture = Image.new("RGB", (200, 50), "red")
    picture.paste("blue", (75, 0, 125, 50))
    fitted, said = fit(picture, (100, 100))
    assert fitted.size == (100, 100)
    assert np.all(np.asarray(fitted)[10:-10, 10:-10] == (0, 0, 255))
    assert said == "200x50 pixels scaled to 400x100, of which the middle 100x100 are taken"
