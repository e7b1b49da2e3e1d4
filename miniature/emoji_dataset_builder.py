"""The emoji as a TensorFlow Dataset, readable without TensorFlow.

    from miniature.emoji_dataset_builder import EmojiStyles

    builder = EmojiStyles(data_dir="data", file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir="tarballs"))
    source = builder.as_data_source("train")  # random access: source[0]["image"]

Needs no TensorFlow when the file format is `array_record`. Records lie in the order of their hashed
keys, which is the same on every machine. Text comes back as UTF-8 bytes.
"""

import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from miniature import emoji, rasters, tarballs

_CITATION = """\
@misc{emoji_styles,
  title = {Emoji in four styles, joined to their labels: Fluent Emoji (Microsoft), Noto Emoji
           (Google), Twemoji (Twitter and other contributors), labels by Emojibase (Miles Johnson)},
}
"""


def _png(record: emoji.Record) -> io.BytesIO:
    # Given bytes, the Image feature stores them; given an array, it would encode with TensorFlow.
    stream = io.BytesIO()
    Image.fromarray(record.image).save(stream, format="PNG")
    stream.seek(0)
    return stream


class EmojiStyles(tfds.core.GeneratorBasedBuilder):
    """Captioned emoji of 128 x 128 pixels on white, in four styles.

    Splits: `train`; and `composition`, (object, style) pairs of which both halves occur in train.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Fluent 3D, Noto, Fluent flat and Twemoji, labels of Emojibase 17."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Fill the manual directory with the five npm tarballs, by `bash miniature/fetch.sh DIR` "
        f"or, inside it, `npm pack {' '.join(tarballs.PACKAGES)}`."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=(
                "Emoji in the styles Fluent 3D, Noto, Fluent flat and Twemoji on a white ground, "
                "with English and Chinese labels, tags, groups and captions naming object and "
                "style."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(rasters.SIZE, rasters.SIZE, 3), encoding_format="png"
                    ),
                    "caption": tfds.features.Text(doc="The canonical caption."),
                    "captions": tfds.features.Sequence(
                        tfds.features.Text(), doc="Every caption, the canonical one first."
                    ),
                    "style": tfds.features.ClassLabel(names=list(tarballs.STYLES)),
                    "label": tfds.features.Text(),
                    "label_zh": tfds.features.Text(),
                    "tags": tfds.features.Sequence(tfds.features.Text()),
                    "group": tfds.features.ClassLabel(names=list(emoji.GROUPS)),
                    "hexcode": tfds.features.Text(),
                }
            ),
            supervised_keys=("caption", "image"),
            homepage="https://github.com/milesj/emojibase",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        collection = emoji.Collection(dl_manager.manual_dir)
        return {
            "train": self._generate_examples(collection, composition=False),
            "composition": self._generate_examples(collection, composition=True),
        }

    def _generate_examples(
        self, collection: emoji.Collection, composition: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in collection.records(composition=composition):
            yield (
                f"{record.emoji.hexcode}/{record.style}",
                {
                    "image": _png(record),
                    "caption": record.captions[0],
                    "captions": list(record.captions),
                    "style": record.style,
                    "label": record.emoji.label,
                    "label_zh": record.emoji.label_zh,
                    "tags": list(record.emoji.tags),
                    "group": record.emoji.group,
                    "hexcode": record.emoji.hexcode,
                },
            )
