"""Writes report.html: one file that needs nothing else, from plain data.

Text is escaped by the template engine wherever it stands (prompts are untrusted), and the page
forbids itself, by a content security policy, scripts and every request.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import numpy as np
from etils import epath
from jaxtyping import UInt8
from markupsafe import Markup

from tlcm_jax.evaluation.reporting.contents import Report, ScoreColumn, ScoreRow
from tlcm_jax.evaluation.reporting.curves import curve_svg
from tlcm_jax.evaluation.reporting.images import data_uri


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Lists a nested config as dotted key and JSON value, in its own order."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, json.dumps(value, ensure_ascii=False, default=str)


def runs(values: Iterable[Any]) -> list[tuple[Any, int]]:
    """Neighbouring equal values as (value, how many): the spans of headings over columns."""
    return [(value, len(list(run))) for value, run in itertools.groupby(values)]


def score_text(column: ScoreColumn, value: float | None) -> str:
    """A score as it is shown; a dash where there is none."""
    if value is None:
        return "–"
    if column.percent:
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def relative_text(column: ScoreColumn, value: float | None, reference: float | None) -> str:
    """A score against the teacher's: a percentage of it, or for distances a multiple."""
    if value is None or not reference:
        return ""
    ratio = value / reference
    return f"{100 * ratio:.0f} %" if column.higher_is_better else f"{ratio:.2f} ×"


def interval_text(column: ScoreColumn, row: ScoreRow) -> str:
    """From where to where a score lies; empty where that is not known."""
    ends = row.intervals.get(column.key)
    return " to ".join(score_text(column, end) for end in ends) if ends else ""


def _score_table(report: Report) -> dict[str, Any]:
    columns = report.shown_columns
    reference = next((row for row in report.scores if row.label == report.reference), None)

    def cell(row: ScoreRow, column: ScoreColumn) -> tuple[str, str, str]:
        value = row.score(column.key)
        # Real images are what to reach, no rival: "184 % of the teacher" would say nothing.
        compared = reference is not None and row is not reference and row.kind != "real"
        against = reference.score(column.key) if reference is not None and compared else None
        told = score_text(column, value), relative_text(column, value, against)
        return *told, interval_text(column, row)

    groups = runs(column.group for column in columns)
    return {
        "groups": groups if any(group for group, _ in groups) else [],
        "columns": columns,
        "rows": [(row, [cell(row, column) for column in columns]) for row in report.scores],
    }


def _stages(report: Report) -> list[tuple[str, list[tuple[str, str, Markup]]]]:
    """Stage -> (title, unit, SVG) of its curves, stages in order of appearance."""
    stages: dict[str, list[tuple[str, str, Markup]]] = {}
    for index, curve in enumerate(report.curves):
        # The drawing holds numbers and our own words only, so it needs no escaping.
        svg = Markup(curve_svg(curve, f"curve {index}"))
        stages.setdefault(curve.stage, []).append((curve.title, curve.unit, svg))
    return list(stages.items())


def _shown_size(images: UInt8[np.ndarray, "n h w 3"]) -> int:
    """Width on the page in CSS px: small images at a whole multiple, so pixels stay even."""
    width = images.shape[2]
    return width * max(1, round(96 / width)) if width <= 64 else 128


def render(report: Report) -> str:
    """Renders a report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tlcm_jax.evaluation.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["shown_size"] = _shown_size
    environment.filters["runs"] = runs
    return environment.get_template("report.html").render(
        report=report,
        table=_score_table(report),
        stages=_stages(report),
        config=list(flatten(report.config)),
    )


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Writes a report as one self-contained HTML file.

    Args:
        path: file to write; a gs:// path where its file system is installed.
        report: what to show.
    """
    epath.Path(path).write_text(render(report))
