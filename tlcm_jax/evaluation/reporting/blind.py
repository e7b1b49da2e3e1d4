"""A page on which people vote between two contestants' images without knowing whose is whose.

Pairs come in random order with random sides. Keys: left and right arrow for the better image, down
for neither, up to go back. The votes stay in the browser until they are saved as a file, and are
summed at the end, when the names are shown too: the share of the decided votes that each contestant
has, with Wilson's 95 % interval (Wilson 1927).
"""

import json
import random
from pathlib import Path

import jinja2

from tlcm_jax.evaluation.reporting.contents import ImageGrid, Report
from tlcm_jax.evaluation.reporting.images import data_uri
from tlcm_jax.io.files import atomic_write

_Z = 1.959964  # of a normal distribution's 97.5 %


def write_blind_page(path: Path, report: Report, *, seed: int = 0) -> None:
    """Writes the page of a report's images.

    Args:
      path: the HTML file.
      report: whose grids are shown, each pair of the reader's choice of columns.
      seed: of order and sides.

    Raises:
      ValueError: no grid has two columns.
    """
    grids = [grid for grid in report.grids if len(grid.rows) > 1]
    if not grids:
        raise ValueError("--blind needs images of two: another step count, --teacher or --baseline")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tlcm_jax.evaluation.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [_name(row.kind, row.label) for row in grids[0].rows]
    data = {"title": report.title, "names": names, "z": _Z, "items": _items(grids, seed)}
    page = environment.get_template("blind.html").render(
        title=report.title, data=_script_json(data)
    )
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")


def wilson(wins: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, as the page computes it; (0, 1) of no votes."""
    if not count:
        return 0.0, 1.0
    share, z2 = wins / count, _Z**2
    middle = share + z2 / (2 * count)
    half = _Z * ((share * (1 - share) + z2 / (4 * count)) / count) ** 0.5
    return (middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count)


def _name(kind: str, label: str) -> str:
    return label if kind == "baseline" else f"{kind}, {label}"


def _items(grids: list[ImageGrid], seed: int) -> list[dict]:
    """Every prompt with its images by column, and for each pair of columns a coin for the sides."""
    items = [
        {
            "prompt": prompt,
            "images": [data_uri(row.images[i]) for row in grid.rows],
        }
        for grid in grids
        if len(grid.rows) == len(grids[0].rows)
        for i, prompt in enumerate(grid.prompts)
    ]
    chance = random.Random(seed)
    chance.shuffle(items)
    return [{**item, "coin": chance.random() < 0.5} for item in items]


def _script_json(data: dict) -> str:
    """JSON that can stand in a script element, whatever a prompt says."""
    text = json.dumps(data, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
