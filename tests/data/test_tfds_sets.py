"""Texts and images of a set that TensorFlow Datasets itself has written, in a folder of its own."""

import io

import numpy as np
import pytest
from PIL import Image

from tlcm_jax.data.prompt_sets import read_prompt_set
from tlcm_jax.data.prompts import read_prompts
from tlcm_jax.data.tfds_sets import read_images, read_texts

tfds = pytest.importorskip("tensorflow_datasets")
IDS = (30, 10, 20)


def png(level: int) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), level, np.uint8)).save(stream, format="PNG")
    stream.seek(0)
    return stream


class LikeCocoCaptions(tfds.core.GeneratorBasedBuilder):
    """The features of `coco_captions`, three examples."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        of = tfds.features
        captions = of.Sequence({"id": np.int64, "text": of.Text()})
        features = {"image": of.Image(), "image/filename": of.Text(), "image/id": np.int64}
        features = of.FeaturesDict({**features, "captions": captions})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"val": self._examples()}

    def _examples(self):
        for number in IDS:
            texts = [{"id": k, "text": f"{word}  {number}"} for k, word in enumerate("ab")]
            named = {"image/filename": f"{number}.png", "image/id": number}
            yield str(number), {"image": png(number), **named, "captions": texts}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    LikeCocoCaptions(data_dir=folder, file_format="array_record").download_and_prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.core.constants, "DATA_DIR", folder)
        yield


NAME = "tfds:like_coco_captions"


def test_an_image_s_first_caption_in_the_order_of_the_images():
    assert read_texts(f"{NAME}@val") == ["a 10", "a 20", "a 30"]
    assert read_texts(f"{NAME}:1.0.0@val#captions/text") == ["a 10", "a 20", "a 30"]
    assert read_texts(f"{NAME}@val#image/filename") == ["10.png", "20.png", "30.png"]
    assert len(read_texts(f"{NAME}@val[:2]")) == 2
    assert read_prompts([f"{NAME}@val"]) == ["a 10", "a 20", "a 30"]
    found = read_prompt_set(f"{NAME}@val")
    assert (found.name, found.prompts) == ("like_coco_captions-val", ("a 10", "a 20", "a 30"))


def test_images_are_those_that_were_written():
    images = list(read_images(f"{NAME}@val"))
    assert sorted(int(image[0, 0, 0]) for image in images) == sorted(IDS)
    assert {image.shape for image in images} == {(8, 9, 3)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:coco", "write tfds:NAME@SPLIT"),
        (f"{NAME}@test", "no split 'test' but val"),
        (f"{NAME}@val#title", "no feature title but image, image/filename, image/id, captions"),
        (f"{NAME}@val#image", "has no text"),
        ("tfds:mnist@train", "is not prepared in .*tfds build mnist"),
        ("tfds:no_such_set@train", "cannot be read"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        read_texts(name)
    assert "\n" not in str(found.value)
