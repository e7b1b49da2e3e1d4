"""The prompt files of the embedded world, for distillation and for evaluation.

    python -m miniature.prompts --manual_dir tarballs --output miniature/prompts

writes plain UTF-8 text, one prompt a line, always the same for the same tarballs:

* train.txt: one caption of every pair that the teacher is trained on and that is not held out;
  half of them in the canonical wording, a quarter in each other one.
* heldout.txt: canonical captions of the pairs held out of train.txt, styles in turn.
* composition.txt: canonical captions of pairs that the teacher never saw, 300 at most.

Beside the last two lies a `.json` of the same length and order, for the judge: prompt, hexcode,
label, style, class_id (row of the class tables of `miniature.emoji`), style_id.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Sequence

from miniature.captions import captions, wording
from miniature.emoji import Collection, Emoji
from miniature.splits import Pair, rank
from miniature.tarballs import STYLES

COMPOSITION_CAP = 300


def _train_prompt(emoji: Emoji, style: str) -> str:
    return captions(emoji.label, style)[wording(emoji.hexcode, style)]


def _order(name: str, pair: Pair) -> int:
    return rank(name, pair[0])


def prompt_files(collection: Collection) -> dict[str, str]:
    """File name -> its whole text, as the module docstring lists them."""
    pairs = collection.pairs()
    class_id = {emoji.hexcode: i for i, emoji in enumerate(collection.emoji)}
    unseen = collection.composition | collection.heldout
    # By hash, so that any first part of a file is a fair sample of the whole.
    train = sorted(
        ((e, s) for e, s in pairs if (e.hexcode, s) not in unseen),
        key=lambda pair: rank(f"train order {pair[1]}", pair[0].hexcode),
    )
    files = {"train.txt": "".join(_train_prompt(e, s) + "\n" for e, s in train)}
    for name, held, cap in (
        ("heldout", collection.heldout, None),
        ("composition", collection.composition, COMPOSITION_CAP),
    ):
        entries = []
        for hexcode, style in sorted(held, key=functools.partial(_order, name))[:cap]:
            emoji = collection.emoji[class_id[hexcode]]
            entries.append(
                {
                    "prompt": captions(emoji.label, style)[0],
                    "hexcode": hexcode,
                    "label": emoji.label,
                    "style": style,
                    "class_id": class_id[hexcode],
                    "style_id": STYLES.index(style),
                }
            )
        files[f"{name}.txt"] = "".join(f"{entry['prompt']}\n" for entry in entries)
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        files[f"{name}.json"] = f"[\n{lines}\n]\n"
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="Emoji tarballs -> prompt files.")
    parser.add_argument("--manual_dir", required=True, help="folder with the five tarballs")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write")
    options = parser.parse_args(argv)
    try:
        files = prompt_files(Collection(options.manual_dir))
        options.output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (options.output / name).write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: {text.count(chr(10)) - 2 * name.endswith('.json')} prompts")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
