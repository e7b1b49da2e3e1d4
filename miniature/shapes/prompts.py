"""The prompt files of a rung of the shapes world, for distillation and for evaluation.

    python -m miniature.shapes.prompts --rung r1 --output miniature/shapes/prompts/r1

writes plain UTF-8 text, one prompt a line, always the same:

* train.txt: captions for distillation, every wording, none of the held-out texts.
* test.txt: 125 held-out captions for each task that the rung allows (1 000 for the whole world).
* composition.txt: 200 captions of held-out pairs and relations, which the teacher never saw.
* open.txt: 512 captions of a shape or a colour alone, for what is left open (`open_attributes`).
* chinese.txt: test.txt in Chinese, line by line.

Beside all but the first lies a `.json` of the same length and order: prompt, task, and the spec
that the judge checks. A text is held out by its hash, one in five.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from miniature.shapes.captions import WORDINGS, chinese, english
from miniature.shapes.scene import RELATIONS, RUNGS, TEST_START, Group, Rung, Spec, draw_spec
from miniature.shapes.splits import HELD_PAIRS, HELD_RELATIONS, held_out

PER_TASK = 125
_COMPOSITIONS = 200
_OPEN = 512
_TRAIN = 6000
_HELD_ONE_IN = 5


def held_text(text: str) -> bool:
    """Whether a caption's text is kept from distillation."""
    digest = hashlib.sha256(f"caption/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_ONE_IN == 0


def tasks(rung: Rung) -> list[str]:
    """The tasks that a rung allows: see `propose`."""
    layouts = {name for name, _ in rung.layouts}
    allowed = {
        "single object": True,
        "colours": len(rung.colours) > 1,
        "size": len(rung.sizes) > 1 and len(rung.fills) == 1,
        "two objects": "pair" in layouts,
        "colour attribution": "pair" in layouts,
        "position": "relation" in layouts,
        "counting": "many" in layouts,
        "fill": len(rung.fills) > 1,
        "style": len(rung.styles) > 1,
    }
    return [name for name, there in allowed.items() if there]


def propose(task: str, rung: Rung, rng: np.random.Generator) -> Spec:
    """One random spec of a task."""

    def one(values: tuple[str, ...]) -> str:
        return values[rng.integers(len(values))]

    def group(*named: str, number: int | None = 1) -> Group:
        return Group(number=number, **{a: one(rung.values(a)) for a in named})

    if task == "single object":
        return Spec(groups=(group("shape"),))
    if task == "colours":
        return Spec(groups=(group("shape", "colour"),))
    if task == "size":
        return Spec(groups=(group("shape", "colour", "size"),))
    if task == "two objects":
        return Spec(groups=(group("shape"), group("shape")))
    if task == "colour attribution":
        return Spec(groups=(group("shape", "colour"), group("shape", "colour")))
    if task == "position":
        relation = one(RELATIONS)
        return Spec(groups=(group("shape"), group("shape")), relation=relation)
    if task == "counting":
        return Spec(groups=(group("shape", number=int(rng.integers(2, 5))),))
    if task == "fill":
        return Spec(groups=(group("shape", "colour", "fill"),))
    if task == "style":
        return Spec(groups=(group("shape", "colour"),), style=one(rung.styles))
    raise ValueError(f"task {task!r}: not one of this world's")


def _held_texts(task: str, rung: Rung) -> Iterator[tuple[Spec, str]]:
    """Endless specs of a task that training may see, in wordings that distillation does not."""
    rng = np.random.default_rng([TEST_START, *task.encode()])
    while True:
        spec = propose(task, rung, rng)
        text = english(spec, int(rng.integers(WORDINGS)))
        if not held_out(spec) and held_text(text):
            yield spec, text


def test_entries(rung: Rung, per_task: int = PER_TASK) -> list[dict]:
    """The test prompts; a task with fewer held-out texts than `per_task` repeats them."""
    entries = []
    for task in tasks(rung):
        texts = _held_texts(task, rung)
        entries += [_entry(task, *next(texts)) for _ in range(per_task)]
    return entries


def composition_entries(rung: Rung, count: int = _COMPOSITIONS) -> list[dict]:
    """Captions of what the teacher never saw: held-out pairs, and relations where there are."""
    rng = np.random.default_rng([TEST_START, 7])
    pairs, triples = sorted(HELD_PAIRS), sorted(HELD_RELATIONS)
    relations = any(name == "relation" for name, _ in rung.layouts)
    entries = []
    for i in range(count):
        if relations and i % 2:
            first, relation, second = triples[rng.integers(len(triples))]
            spec = Spec(groups=(Group(shape=first), Group(shape=second)), relation=relation)
        else:
            shape, colour = pairs[i // (2 if relations else 1) % len(pairs)]
            spec = Spec(groups=(Group(shape=shape, colour=colour),))
        entries.append(_entry("composition", spec, english(spec, int(rng.integers(WORDINGS)))))
    return entries


def open_entries(rung: Rung, count: int = _OPEN) -> list[dict]:
    """Captions that name a shape or a colour and nothing else, each as often as the others."""
    kinds = [Spec(groups=(Group(shape=shape),)) for shape in rung.shapes]
    kinds += [Spec(groups=(Group(colour=colour),)) for colour in rung.colours]
    return [
        _entry("open", spec, english(spec, i // len(kinds) % WORDINGS))
        for i, spec in enumerate((kinds * (1 + count // len(kinds)))[:count])
    ]


@functools.cache
def prompt_sets(rung: Rung) -> dict[str, list[dict]]:
    """The entries of each file that has a `.json` beside it, but for the Chinese."""
    return {
        "test": test_entries(rung),
        "composition": composition_entries(rung),
        "open": open_entries(rung),
    }


def train_texts(rung: Rung, count: int = _TRAIN) -> list[str]:
    """Distinct captions for distillation, as the training scenes have them; fewer if the rung
    does not hold as many.
    """  # noqa: D205
    texts: dict[str, None] = {}
    for index in range(8 * count):
        text = english(draw_spec(index, rung), index % WORDINGS)
        if not held_text(text):
            texts[text] = None
        if len(texts) == count:
            break
    return list(texts)


def _entry(task: str, spec: Spec, text: str) -> dict:
    return {"prompt": text, "task": task, "spec": dataclasses.asdict(spec)}


def spec_of(entry: dict) -> Spec:
    """The spec of an entry of a `.json` prompt file."""
    raw = entry["spec"]
    return Spec(**{**raw, "groups": tuple(Group(**group) for group in raw["groups"])})


def prompt_files(rung: Rung) -> dict[str, str]:
    """File name -> its whole text."""
    sets = prompt_sets(rung)
    sets["chinese"] = [
        {**entry, "prompt": chinese(spec_of(entry), i % WORDINGS)}
        for i, entry in enumerate(sets["test"])
    ]
    files = {"train.txt": "".join(f"{text}\n" for text in train_texts(rung))}
    for name, entries in sets.items():
        files[f"{name}.txt"] = "".join(f"{entry['prompt']}\n" for entry in entries)
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        files[f"{name}.json"] = f"[\n{lines}\n]\n"
    return files


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rung", choices=RUNGS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in prompt_files(RUNGS[args.rung]).items():
        (args.output / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{args.output / name}: {text.count(chr(10)) - 2 * name.endswith('.json')} prompts")


if __name__ == "__main__":
    main()
