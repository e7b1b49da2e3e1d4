"""Several images of each prompt: how various they are, and the folders that benchmarks read.

Draw k of a prompt has the noise of seed + k, so the first draw is the evaluation's own.

| layout | prompts | folder | draws | for |
|---|---|---|---|---|
| geneval | its evaluation_metadata.jsonl | 00000/metadata.jsonl, samples/0000.png | 4 | its own |
| geneval2 | its geneval2_data.jsonl | 00000.png, images.json: paths by prompt | 1 | its own |
| dpg | a .jsonl with `item_id` and `prompt` | ID.png, a grid of 2 x 2 | 4 | compute_dpg_bench.py |
| hpd | a file for each style, named so | STYLE/00000.jpg | 1 | hpsv2.evaluate |

The benchmarks' own detectors and question answerers are theirs to run. GenEval 2 takes
`images.json` as `--image_filepath_data`.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.evaluation.contestants import Contestant, image_chunks
from tlcm_jax.evaluation.results import Evaluation
from tlcm_jax.evaluation.scorers.base import Measure
from tlcm_jax.evaluation.scorers.pairwise import Distance, diversity
from tlcm_jax.generation.generate import GenerationOptions
from tlcm_jax.io.files import atomic_write

DIVERSITY = Measure(key="diversity", title="diversity (LPIPS)")
# Name -> draws of a prompt.
LAYOUTS = {"geneval": 4, "geneval2": 1, "dpg": 4, "hpd": 1}
_JPEG_QUALITY = 95


def draws(
    by: Contestant,
    prompts: PromptSet,
    seeds: Sequence[int],
    options: GenerationOptions,
    store: Path | None,
) -> Iterator[tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "draws n h w 3"]]]:
    """Rows of a prompt set and their images under each of several noises."""
    each = [image_chunks(by, prompts, seed, options, store) for seed in seeds]
    for chunks in zip(*each, strict=True):
        yield chunks[0][0], np.stack([images for _, images in chunks])


def with_diversity(
    result: Evaluation,
    distance: Distance,
    count: int,
    prompts: int,
    options: GenerationOptions,
    store: Path | None,
) -> Evaluation:
    """An evaluation with one more score: how far apart the images of a prompt are.

    Args:
      result: the evaluation.
      distance: LPIPS.
      count: images of a prompt, at least 2.
      prompts: of each set, the first ones.
      options: those of the evaluation.
      store: folder where images are kept; None keeps none.
    """
    seeds = range(result.seed, result.seed + count)
    sets = []
    for one_set in result.sets:
        some = dataclasses.replace(
            one_set.prompts.first(min(prompts, len(one_set.prompts.prompts))), annotations={}
        )
        generated = []
        for one in one_set.generated:
            parts = [
                (diversity(distance, images), len(rows))
                for rows, images in draws(one.by, some, seeds, options, store)
            ]
            mean = sum(found * rows for found, rows in parts) / sum(rows for _, rows in parts)
            scores = {**one.scores, DIVERSITY.key: mean}
            generated.append(dataclasses.replace(one, scores=scores))
        sets.append(dataclasses.replace(one_set, generated=tuple(generated)))
    return dataclasses.replace(result, sets=tuple(sets), measures=(*result.measures, DIVERSITY))


def layout_rows(name: str, path: str, prompts: PromptSet) -> list[dict]:
    """What a layout writes of each prompt besides its images: the lines of its file.

    Args:
      name: a key of `LAYOUTS`.
      path: the prompt file.
      prompts: what was read of it, perhaps only its first ones.

    Raises:
      ValueError: the layout needs a .jsonl, or a line of it lacks what it needs.
    """
    if name == "hpd":
        return [{}] * len(prompts.prompts)
    if not path.endswith(".jsonl"):
        raise ValueError(f"--layout {name} needs the benchmark's .jsonl as --prompts, not {path}")
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = []
    for number, prompt in enumerate(prompts.prompts):
        try:
            row = json.loads(lines[number])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number + 1} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number + 1} is no JSON object")
        if " ".join(str(row.get("prompt")).split()) != prompt:
            raise ValueError(f"{path}, line {number + 1}: its prompt is not {prompt!r}")
        item = row.get("item_id")
        if name == "dpg" and (not isinstance(item, str) or Path(item).name != item):
            raise ValueError(f"{path}, line {number + 1}: 'item_id' must be a file's name")
        rows.append(row)
    return rows


def write_layout(
    name: str,
    folder: Path,
    by: Contestant,
    prompts: PromptSet,
    rows: Sequence[dict],
    seed: int,
    options: GenerationOptions,
    store: Path | None,
) -> Path:
    """Writes a contestant's images as a benchmark reads them; returns the folder of them.

    Args:
      name: a key of `LAYOUTS`.
      folder: under which they go.
      by: whose images.
      prompts: of what.
      rows: as of `layout_rows`.
      seed: of the first draw.
      options: those of the evaluation.
      store: folder where images are kept; None keeps none.

    Raises:
      OSError: they cannot be written.
    """
    target = folder / name / by.label.replace(", ", "-").replace(" ", "-")
    seeds = range(seed, seed + LAYOUTS[name])
    paths: dict[str, str] = {}
    for numbers, images in draws(by, prompts, seeds, options, store):
        for column, number in enumerate(numbers):
            if name == "geneval":
                _write_geneval(target / f"{number:05d}", rows[number], images[:, column])
            elif name == "geneval2":
                target.mkdir(parents=True, exist_ok=True)
                file = target / f"{number:05d}.png"
                _save(images[0, column], file)
                # By the text as the benchmark's file has it, white space and all.
                paths[rows[number]["prompt"]] = str(file.resolve())
            elif name == "dpg":
                _write_dpg(target / f"{rows[number]['item_id']}.png", images[:, column])
            else:
                style = target / prompts.name
                style.mkdir(parents=True, exist_ok=True)
                _save(images[0, column], style / f"{number:05d}.jpg")
    if paths:
        text = json.dumps(paths, ensure_ascii=False, indent=1)
        _save_text(target / "images.json", f"{text}\n")
    return target


def _write_geneval(target: Path, row: dict, images: UInt8[np.ndarray, "draws h w 3"]) -> None:
    (target / "samples").mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False)
    _save_text(target / "metadata.jsonl", f"{line}\n")
    for draw, image in enumerate(images):
        _save(image, target / "samples" / f"{draw:04d}.png")


def _write_dpg(target: Path, images: UInt8[np.ndarray, "draws h w 3"]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = images.shape
    grid = images.reshape(2, 2, height, width, 3).transpose(0, 2, 1, 3, 4)
    _save(grid.reshape(2 * height, 2 * width, 3), target)


def _save(image: UInt8[np.ndarray, "h w 3"], target: Path) -> None:
    """Writes a PNG or JPEG, whole or not at all."""
    form = {".png": "PNG", ".jpg": "JPEG"}[target.suffix]
    with atomic_write(target) as part:
        Image.fromarray(image).save(part, format=form, quality=_JPEG_QUALITY)


def _save_text(target: Path, text: str) -> None:
    with atomic_write(target) as part:
        part.write_text(text, encoding="utf-8")
