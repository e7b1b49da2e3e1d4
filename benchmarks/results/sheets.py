"""Contact sheets: the same prompts and noise by every row of a table, small enough to commit."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results.experiment import Table
from benchmarks.results.runs import PICTURES, Plan, Run
from tlcm_jax.evaluation.reporting.contents import ImageGrid, ImageRow, Kind
from tlcm_jax.evaluation.reporting.images import contact_sheet
from tlcm_jax.io.files import atomic_write

LARGEST = 300_000
# Twelve letters then fit over a column of 64-pixel pictures.
_SCALE = 2


def write_sheets(tables: Sequence[Table], plan: Plan, folder: Path) -> dict[str, dict[int, str]]:
    """Writes each table's sheets, of the first seed's runs, as `TABLE-STEPS.png`.

    Returns:
      Links relative to the folder's parent, by table and steps.
    """
    teacher = plan.teachers[plan.seeds[0]]
    links: dict[str, dict[int, str]] = {}
    for table in tables:
        for steps in table.shown:
            rows = list(_columns(table, plan, steps))
            if not rows:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            rows.append(_column(teacher, "teacher", 25))
            rows.append(_column(teacher, "teacher", 4))
            name = f"{table.name}-{steps}.png"
            prompts = (teacher.scores() or {})["shown"]
            with atomic_write(folder / name) as part:
                _write(part, prompts, rows)
            links.setdefault(table.name, {})[steps] = f"{folder.name}/{name}"
    return links


def _columns(table: Table, plan: Plan, steps: int) -> Iterator[ImageRow]:
    for experiment in table.experiments:
        for run in plan.runs.get(experiment.name, ()):
            if run.seed == plan.seeds[0] and run.scores() is not None:
                yield _column(run, "student", steps, experiment.name)


def _column(run: Run, kind: Kind, steps: int, label: str = "") -> ImageRow:
    with np.load(run.folder / PICTURES) as file:
        pictures: Mapping[str, np.ndarray] = dict(file)
    return ImageRow(label or f"{steps} steps", pictures[f"{kind}-{steps}"], kind)


def _write(path: Path, prompts: Sequence[str], rows: Sequence[ImageRow]) -> None:
    """A sheet of as many prompts as fit into `LARGEST` bytes, in 256 colours."""
    for count in range(len(prompts), 0, -1):
        first = [ImageRow(row.label, row.images[:count], row.kind) for row in rows]
        contact_sheet(path, ImageGrid("rows", prompts[:count], first), scale=_SCALE)
        with Image.open(path) as full:
            image = full.quantize(256, dither=Image.Dither.NONE)
        image.save(path, format="PNG", optimize=True)
        if path.stat().st_size <= LARGEST:
            return
