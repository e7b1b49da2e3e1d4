"""The shapes world as a TensorFlow Dataset, readable without TensorFlow.

    from miniature.shapes.dataset_builder import Shapes

    builder = Shapes(config="r1", data_dir="data", file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("train")  # random access: source[0]["image"]

Rendered when it is prepared; nothing is downloaded. There is one configuration a rung. The world
has no end: `train` holds the first 20 000 integers, `test` 1 000 from `TEST_START`, and
`composition` answers the held-out captions. Text comes back as UTF-8 bytes.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from miniature.shapes.captions import WORDINGS, chinese, english
from miniature.shapes.prompts import composition_entries, spec_of
from miniature.shapes.render import render
from miniature.shapes.scene import (
    ATTRIBUTES,
    GROUNDS,
    RUNGS,
    SIDE,
    STYLES,
    TEST_START,
    Rung,
    Spec,
    draw_scene,
    draw_spec,
)

_TRAIN, _TEST = 20000, 1000


def record(spec: Spec, index: int, rung: Rung) -> dict[str, Any]:
    """One example: the picture of a spec that an integer chooses, its captions and its content."""
    scene = draw_scene(spec, index, rung)
    stream = io.BytesIO()
    # Given bytes, the Image feature stores them; given an array, it would encode with TensorFlow.
    Image.fromarray(render(scene)).save(stream, format="PNG")
    stream.seek(0)
    return {
        "image": stream,
        "captions": [english(spec, wording) for wording in range(WORDINGS)],
        "captions_zh": [chinese(spec, wording) for wording in range(WORDINGS)],
        "style": scene.style,
        "ground": scene.ground,
        "objects": [
            {
                **{name: getattr(thing, name) for name in ATTRIBUTES},
                **{name: getattr(thing, name) for name in ("x", "y", "radius", "rotation")},
            }
            for thing in scene.things
        ],
    }


class ShapesConfig(tfds.core.BuilderConfig):
    """A rung of the world."""


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Captioned scenes of one to four objects, 64 x 64 pixels, with everything that is in them."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Four rungs, English and Chinese captions."}
    BUILDER_CONFIGS = [ShapesConfig(name=name) for name in RUNGS]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        content: dict[str, Any] = {
            name: features.ClassLabel(names=list(values)) for name, values in ATTRIBUTES.items()
        }
        content |= {name: features.Scalar(np.float32) for name in ("x", "y", "radius", "rotation")}
        return self.dataset_info_from_configs(
            description=(
                "Procedural scenes with captions in English and Chinese whose answers have a"
                " known distribution: what a caption does not name is uniform."
            ),
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                    "captions": features.Sequence(features.Text()),
                    "captions_zh": features.Sequence(features.Text()),
                    "style": features.ClassLabel(names=list(STYLES)),
                    "ground": features.ClassLabel(names=list(GROUNDS)),
                    "objects": features.Sequence(content),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        rung = RUNGS[self.builder_config.name]
        held = [spec_of(entry) for entry in composition_entries(rung)]
        return {
            "train": self._drawn(range(_TRAIN), rung),
            "test": self._drawn(range(TEST_START, TEST_START + _TEST), rung),
            "composition": (
                (str(TEST_START + i), record(spec, TEST_START + i, rung))
                for i, spec in enumerate(held)
            ),
        }

    def _drawn(self, indices: range, rung: Rung) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in indices:
            yield str(index), record(draw_spec(index, rung), index, rung)

    def _generate_examples(self) -> None:  # each split brings its own generator
        raise NotImplementedError
