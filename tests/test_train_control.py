"""`train_control`: a folder of pictures and maps to a network that `sample --control` reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import train_control as command
from tlcm_jax.data.control_pictures import Examples
from tlcm_jax.families.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and eight pictures that are their maps."""
    folder = tmp_path_factory.mktemp("w")
    write_tiny_pipeline(folder / "tiny")
    (folder / "pictures").mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(8):
        blocks = rng.integers(0, 2, (4, 4, 1), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray((255 * blocks).repeat(3, 2)).save(folder / f"pictures/{i}.png")
        name = f"{i}.png"
        lines.append({"file_name": name, "text": "a cat", "conditioning_image_file_name": name})
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "pictures/metadata.jsonl").write_text(text)
    return folder


def large(size, seed):
    """Pictures of another size than the tiny model's."""
    del seed
    images = np.zeros((size, 64, 64, 3), np.uint8)
    yield Examples(images=images, maps=images, texts=["a cat"] * size)


def run(folder, **words):
    values = flags.FlagValues()
    command.define_flags(values)
    words = {
        "model": folder / "tiny", "images": folder / "pictures", "batch": 8, "steps": 60,
        "learning_rate": 3e-3, **words,
    }  # fmt: skip
    values(["command", *(f"--{name}={value}" for name, value in words.items())])
    command.run(values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["controlnet", "t2i-adapter"])
def test_it_learns_what_pictures_have_to_do_with_their_maps(folder, tmp_path, kind):
    more = {"embedding_widths": "8,12,16"} if kind == "controlnet" else {}
    run(folder, kind=kind, output=tmp_path / "out", workdir=tmp_path / "run", grey=True, **more)
    model = load_model(folder / "tiny")
    control = model.load_control(tmp_path / "out")
    image = jnp.asarray(Image.open(folder / "pictures/0.png"), jnp.float32)[None] / 255
    x0 = model.encode_images(image)
    t, e = jnp.full(1, 700), jax.random.normal(jax.random.key(1), x0.shape)
    z = model.process.add_noise(x0, e, t)
    conditioning = model.encode(["a cat"])

    def error(scale):
        told = model.with_controls(conditioning, [image[..., :1]], [scale])
        controls = [(control.network, control.params)]
        found = model.predict(model.params["unet"], z, t, told, controls=controls)
        return float(jnp.mean(jnp.square(found - e)))

    # 60 steps on a UNet of random weights.
    assert error(1.0) < 0.95 * error(0.0)


def test_what_does_not_go_together_is_one_line(folder, tmp_path):
    where = {"output": tmp_path / "out", "workdir": tmp_path / "run"}
    for words, said in (
        ({"kind": "controlnet", "embedding_widths": "8,a,16"}, "give whole numbers"),
        ({"kind": "controlnet", "embedding_widths": "8,16"}, "for which 3 are needed"),
        ({"kind": "t2i-adapter", "images": folder / "none"}, "holds no metadata.jsonl"),
        (
            {"kind": "t2i-adapter", "images": "tests.test_train_control:large", "canny": True},
            "--canny takes edges of a folder's pictures",
        ),
        (
            {"kind": "t2i-adapter", "images": "tests.test_train_control:large"},
            "give uint8 .8, 32, 32, 3.",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            run(folder, **where, **words)
