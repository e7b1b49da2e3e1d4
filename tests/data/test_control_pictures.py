"""Folders of pictures with maps, and functions in their place."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlcm_jax.data import control_pictures
from tlcm_jax.data.control_pictures import Examples, folder_examples, function_examples, read_lines


def write(folder, *lines):
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n")


def line(i, **more):
    return {"file_name": f"{i}.png", "text": f"picture {i}"} | more


def test_each_picture_comes_with_its_caption_and_map_once_an_epoch(tmp_path):
    maps = {"conditioning_image_file_name": "2.png"}
    write(tmp_path, line(0), line(1, **maps), "", line(2))
    lines = read_lines(tmp_path)
    assert [each.map for each in lines] == [None, tmp_path / "2.png", None]

    def image_of(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path))

    def map_of(each):
        return image_of(each.image)[..., :1]

    stream = folder_examples(tmp_path, 3, 0, image_of, map_of)
    for _ in range(2):
        batch = next(stream)
        batch.check("here", (8, 8), 1)
        assert sorted(batch.texts) == [f"picture {i}" for i in range(3)]
        for image, map_, text in zip(batch.images, batch.maps, batch.texts, strict=True):
            assert image[0, 0, 0] == map_[0, 0, 0] == 50 * int(text[-1])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1 is not JSON"),
        ([{"file_name": "0.png"}], "line 1: must be an object with texts file_name, text and"),
        (
            [{"file_name": "0.png", "text": "a", "conditioning_image_file_name": 3}],
            "an object with",
        ),
        (["", line(7)], "line 2: there is no file .*7.png"),
        ([line(0, conditioning_image_file_name="9.png")], "there is no file .*9.png"),
        ([""], "lists no pictures"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, said):
    write(tmp_path, *lines)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_lines(tmp_path)


def test_a_folder_without_its_list_is_told_what_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no metadata.jsonl: write a line for each"):
        read_lines(tmp_path)


def test_a_function_is_called_with_size_and_seed(monkeypatch):
    monkeypatch.setattr(control_pictures, "mine", lambda size, seed: [size, seed], raising=False)
    assert function_examples("tlcm_jax.data.control_pictures:mine", 4, 7) == [4, 7]
    assert function_examples("some/folder", 4, 7) is None
    for path in ("tlcm_jax.no:mine", "tlcm_jax.data.control_pictures:none"):
        with pytest.raises(ValueError, match=f"--images {path}: "):
            function_examples(path, 4, 7)


def test_pictures_of_another_size_are_refused():
    batch = Examples(
        images=np.zeros((1, 8, 8, 3), np.uint8), maps=np.zeros((1, 8, 8, 1), np.uint8), texts=["a"]
    )
    with pytest.raises(ValueError, match=r"here: maps of uint8 \(1, 8, 8, 1\) for 1 texts"):
        batch.check("here", (8, 8), 3)
    with pytest.raises(ValueError, match=r"here: images of uint8 .* give uint8 \(1, 4, 8, 3\)"):
        batch.check("here", (4, 8), 1)
    twice = dataclasses.replace(batch, latents=np.zeros((1, 1, 1, 4), np.float32))
    with pytest.raises(ValueError, match="here: give a batch's images, or else their latents"):
        twice.check("here", (8, 8), 1)
