"""The world as a TensorFlow Dataset, prepared and read without TensorFlow."""

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")

from miniature.shapes import dataset_builder  # noqa: E402
from miniature.shapes.captions import english, parse_english  # noqa: E402
from miniature.shapes.render import picture  # noqa: E402
from miniature.shapes.scene import RUNGS, TEST_START, draw_spec  # noqa: E402


def test_prepares_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_builder, "_TRAIN", 12)
    monkeypatch.setattr(dataset_builder, "_TEST", 5)
    builder = dataset_builder.Shapes(config="r3", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    train, test = builder.as_data_source("train"), builder.as_data_source("test")
    assert (len(train), len(test)) == (12, 5)
    assert len(builder.as_data_source("composition")) == 200
    expected = {picture(TEST_START + i, RUNGS["r3"]).tobytes() for i in range(5)}
    assert {np.asarray(example["image"]).tobytes() for example in test} == expected
    captions = {example["captions"][0].decode() for example in train}
    assert captions == {english(draw_spec(i, RUNGS["r3"])) for i in range(12)}
    for example in train:
        spec = parse_english(example["captions"][0].decode())
        numbers = [group.number for group in spec.groups]
        if None not in numbers:
            assert len(example["objects"]["shape"]) == sum(numbers)
