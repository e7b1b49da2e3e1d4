"""Captioned emoji in four styles: pictures joined to English and Chinese labels.

An object is an emoji with a group (regional indicator letters have none) and without a skin-tone
variant; it is named by its hex code: lower case, code points joined by `-`, FE0F dropped. A record
is one picture of one object in one style, 128 x 128 pixels on white.

    python -m miniature.emoji --manual_dir tarballs --output emoji32.npz --size 32

writes every record, resized, into one `.npz` (no pickles). n records, c objects, k templates:

    images           [n, size, size, 3] uint8
    class_ids        [n] int32      row of the class_* tables
    style_ids        [n] int32      row of style_names
    composition      [n] bool       held out of the teacher's training
    heldout          [n] bool       in the teacher's training, held out of distillation's prompts
    captions         [n, k] str     column 0 is the canonical one
    class_hexcodes   [c] str        sorted
    class_labels     [c] str
    class_labels_zh  [c] str
    class_groups     [c] str
    class_tags       [c] str        joined by `|`
    style_names      [4] str
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from miniature import captions as wording
from miniature import rasters, splits, tarballs
from miniature.tarballs import STYLES, Tarball

_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GROUPS = (
    "smileys-emotion",
    "people-body",
    "component",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One object, with no picture yet.

    Attributes:
      hexcode: lower case, without FE0F, for example `1f469-200d-1f373`.
      label: English name.
      label_zh: Chinese name.
      tags: English search words.
      group: one of `GROUPS`.
      styles: where a picture of it exists, in the order of `STYLES`.
    """

    hexcode: str
    label: str
    label_zh: str
    tags: tuple[str, ...]
    group: str
    styles: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture of one object in one style.

    Attributes:
      emoji: the object.
      style: one of `STYLES`.
      image: `[128, 128, 3]` uint8, on white.
      captions: the canonical one first.
      composition: whether the pair is held out of the teacher's training.
      heldout: whether the pair is held out of distillation's prompts only.
    """

    emoji: Emoji
    style: str
    image: np.ndarray
    captions: tuple[str, ...]
    composition: bool
    heldout: bool


def normal_hexcode(code: str) -> str:
    """Lower case, without the variation selector FE0F."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _is_toned(hexcode: str) -> bool:
    """Whether this is a skin-tone variant of another emoji (a bare tone swatch is not)."""
    parts = hexcode.split("-")
    return len(parts) > 1 and not _SKIN_TONES.isdisjoint(parts)


class _WebpFolder:
    """Pictures as `assets/<code points>.webp`."""

    def __init__(self, tarball: Tarball):
        self._tarball = tarball
        self._member: dict[str, str] = {}
        for name in tarball.names("assets/"):
            if name.endswith(".webp"):
                code = name.removeprefix("assets/").removesuffix(".webp")
                # Where both spellings exist, the first of the sorted names wins on every machine.
                self._member.setdefault(normal_hexcode(code), name)
        self.hexcodes = set(self._member)

    def image(self, hexcode: str) -> np.ndarray:
        return rasters.from_webp(self._tarball.read(self._member[hexcode]))


class _IconSet:
    """Pictures as SVG bodies in Iconify's `icons.json`, named through `chars.json`."""

    def __init__(self, tarball: Tarball):
        self._icons = tarball.json("icons.json")
        characters = tarball.json("chars.json")
        icons = self._icons.get("icons") if isinstance(self._icons, dict) else None
        if not isinstance(characters, dict) or not isinstance(icons, dict):
            raise ValueError(f"{tarball.path} is not an Iconify set: fetch it again")
        self._name = {normal_hexcode(code): name for code, name in sorted(characters.items())}
        self.hexcodes = set(self._name)

    def image(self, hexcode: str) -> np.ndarray:
        name = self._name[hexcode]
        icon = self._icons["icons"].get(name)
        if icon is None:
            raise ValueError(f"chars.json names icon {name!r}, which icons.json does not hold")
        if "body" not in icon:
            raise ValueError(f"icon {name!r} of icons.json has no body")
        field = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
        field |= {k: self._icons[k] for k in field if k in self._icons}
        field |= {k: icon[k] for k in field if k in icon}
        box = (field["left"], field["top"], field["width"], field["height"])
        return rasters.from_svg(icon["body"], box)


class Collection:
    """All objects of a folder of tarballs; pictures are decoded when asked for.

    Args:
      manual_dir: the folder that `miniature/fetch.sh` filled.

    Raises:
      FileNotFoundError: a tarball is missing.
      ValueError: a tarball is damaged or does not hold what its version holds.
    """

    def __init__(self, manual_dir: str | os.PathLike[str]):
        folder = pathlib.Path(manual_dir)
        labels = Tarball(folder / tarballs.LABELS)
        self._sources: dict[str, _WebpFolder | _IconSet] = {}
        for style, file in tarballs.IMAGES.items():
            source = Tarball(folder / file)
            self._sources[style] = _WebpFolder(source) if style == "fluent-3d" else _IconSet(source)
        self.emoji = self._joined(labels)
        styles_of = {e.hexcode: e.styles for e in self.emoji}
        self.composition = splits.composition_pairs(styles_of)
        self.heldout = splits.heldout_pairs(styles_of, STYLES)

    def _joined(self, labels: Tarball) -> tuple[Emoji, ...]:
        try:
            chinese = {normal_hexcode(e["hexcode"]): e for e in labels.json("zh/data.json")}
            english = {normal_hexcode(e["hexcode"]): e for e in labels.json("en/data.json")}
            found = []
            for hexcode, entry in sorted(english.items()):
                styles = tuple(s for s in STYLES if hexcode in self._sources[s].hexcodes)
                if not styles or "group" not in entry or _is_toned(hexcode):
                    continue
                found.append(
                    Emoji(
                        hexcode=hexcode,
                        label=entry["label"],
                        label_zh=chinese[hexcode]["label"],
                        tags=tuple(entry.get("tags", ())),
                        group=GROUPS[entry["group"]],
                        styles=styles,
                    )
                )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{labels.path}: an entry of data.json lacks a field ({error!r}); fetch it again"
            ) from error
        return tuple(found)

    def pairs(self) -> list[tuple[Emoji, str]]:
        """Every (object, style) that has a picture, by hex code, then by style."""
        return [(emoji, style) for emoji in self.emoji for style in emoji.styles]

    def image(self, emoji: Emoji, style: str) -> np.ndarray:
        """`[128, 128, 3]` uint8 picture on white.

        Raises:
          ValueError: the picture does not decode; the message names it.
        """
        try:
            return self._sources[style].image(emoji.hexcode)
        except ValueError as error:
            raise ValueError(f"{style} {emoji.hexcode} ({emoji.label}): {error}") from error

    def records(self, composition: bool | None = None) -> Iterator[Record]:
        """Records in the order of `pairs`.

        Args:
          composition: only those held out of the teacher's training (True), only the others
            (False), or all (None).
        """
        for emoji, style in self.pairs():
            pair = (emoji.hexcode, style)
            held = pair in self.composition
            if composition is not None and held != composition:
                continue
            yield Record(
                emoji=emoji,
                style=style,
                image=self.image(emoji, style),
                captions=wording.captions(emoji.label, style),
                composition=held,
                heldout=pair in self.heldout,
            )


def arrays(collection: Collection, size: int) -> dict[str, np.ndarray]:
    """All records as the arrays that the module docstring lists.

    Args:
      collection: where the records come from.
      size: pixels of the pictures' side, at most 128.
    """
    row = {emoji.hexcode: i for i, emoji in enumerate(collection.emoji)}
    total = len(collection.pairs())
    columns: dict[str, list[Any]] = {
        k: [] for k in ("class_ids", "style_ids", "composition", "heldout", "captions")
    }
    images = np.empty((total, size, size, 3), np.uint8)
    for i, record in enumerate(collection.records()):
        images[i] = rasters.resize(record.image, size)
        columns["class_ids"].append(row[record.emoji.hexcode])
        columns["style_ids"].append(STYLES.index(record.style))
        columns["composition"].append(record.composition)
        columns["heldout"].append(record.heldout)
        columns["captions"].append(record.captions)
    return {
        "images": images,
        "class_ids": np.array(columns["class_ids"], np.int32),
        "style_ids": np.array(columns["style_ids"], np.int32),
        "composition": np.array(columns["composition"], bool),
        "heldout": np.array(columns["heldout"], bool),
        "captions": np.array(columns["captions"], str),
        "class_hexcodes": np.array([e.hexcode for e in collection.emoji], str),
        "class_labels": np.array([e.label for e in collection.emoji], str),
        "class_labels_zh": np.array([e.label_zh for e in collection.emoji], str),
        "class_groups": np.array([e.group for e in collection.emoji], str),
        "class_tags": np.array(["|".join(e.tags) for e in collection.emoji], str),
        "style_names": np.array(STYLES, str),
    }


def summary(collection: Collection) -> str:
    """One line of counts."""
    complete = sum(e.styles == STYLES for e in collection.emoji)
    return (
        f"{len(collection.pairs())} pictures of {len(collection.emoji)} objects, {complete} in all "
        f"{len(STYLES)} styles; {len(collection.composition)} composition, "
        f"{len(collection.heldout)} heldout"
    )


def _write(path: pathlib.Path, columns: dict[str, np.ndarray]) -> None:
    # Written beside its place and moved there: a cut-off run leaves no half file under the name.
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **columns)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="Emoji tarballs -> one .npz of pictures.")
    parser.add_argument("--manual_dir", required=True, help="folder with the five tarballs")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the .npz to write")
    parser.add_argument("--size", type=int, default=32, help="side in pixels, 1..128")
    options = parser.parse_args(argv)
    if not 1 <= options.size <= rasters.SIZE:
        parser.error(f"--size {options.size}: choose 1..{rasters.SIZE}")
    try:
        collection = Collection(options.manual_dir)
        print(summary(collection))
        _write(options.output, arrays(collection, options.size))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
