"""An evaluation for people and programs: `metrics.json`, `report.html` and contact sheets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlcm_jax.evaluation.reporting.contents import (
    Curve,
    ImageGrid,
    ImageRow,
    Report,
    ScoreColumn,
    ScoreRow,
)
from tlcm_jax.evaluation.reporting.images import contact_sheet
from tlcm_jax.evaluation.reporting.markdown import markdown_table
from tlcm_jax.evaluation.reporting.report import relative_text, write_report
from tlcm_jax.evaluation.results import REFERENCE_STEPS, Evaluation, SetResult, chosen, kind_of
from tlcm_jax.io.files import atomic_write

# The step count that headlines quote: the paper's own.
_HEADLINE_STEPS = 4


def build_report(
    evaluation: Evaluation,
    *,
    title: str,
    summary: str = "",
    highlights: Mapping[str, str] | None = None,
    pictures: int = 12,
    curves: Sequence[Curve] = (),
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Report:
    """The report of an evaluation, and of the run that it closes.

    Args:
      evaluation: what was generated and scored.
      title: heading of the page.
      summary: a sentence or two under it.
      highlights: label -> short text, shown after the evaluation's own.
      pictures: prompts shown of each set.
      curves: of the training, if there was one.
      config: of the run.
      provenance: label -> text, as `reporting.provenance` gives it.
    """
    rows = list(_score_rows(evaluation))
    labels = [row.label for row in rows]
    teacher = evaluation.sets[0].find("teacher", REFERENCE_STEPS)
    return Report(
        title=title,
        summary=summary,
        highlights={**_highlights(evaluation), **(highlights or {})},
        grids=[image_grid(evaluation, result, pictures) for result in evaluation.sets],
        scores=rows,
        columns=list(_columns(evaluation)),
        reference=teacher.by.label if teacher and teacher.by.label in labels else None,
        curves=curves,
        config=config or {},
        provenance=provenance or {},
    )


def save(folder: Path, evaluation: Evaluation, report: Report) -> None:
    """Writes `metrics.json`, `scores.md`, `report.html`, and for each set `samples/NAME.png`.

    Raises:
      OSError: they cannot be written.
    """
    samples = folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    for result, grid in zip(evaluation.sets, report.grids, strict=True):
        with atomic_write(samples / f"{result.prompts.name}.png") as part:
            contact_sheet(part, grid)
    with atomic_write(folder / "metrics.json") as part:
        part.write_text(json.dumps(evaluation.metrics(), indent=2) + "\n", encoding="utf-8")
    with atomic_write(folder / "scores.md") as part:
        part.write_text(markdown_table(report), encoding="utf-8")
    with atomic_write(folder / "report.html") as part:
        write_report(part, report)


def image_grid(evaluation: Evaluation, result: SetResult, count: int) -> ImageGrid:
    """Some prompts of a set, by everybody, as far as their images were kept."""
    shown = chosen(result.prompts, min(count, len(result.shown)))
    kept = np.searchsorted(result.shown, shown)
    scale = evaluation.guidance_scale
    guidance = "" if scale is None else f"; the teacher with guidance {scale:g}"
    fresh = "" if evaluation.gamma == 1 else f"; the student with gamma {evaluation.gamma:g}"
    kind = kind_of(result.prompts)
    turn = f", each {kind} in turn" if kind else ""
    return ImageGrid(
        title=result.prompts.name,
        prompts=[result.prompts.prompts[i] for i in shown],
        rows=[
            ImageRow(one.by.label.removeprefix(f"{one.kind}, "), one.images[kept], one.kind)
            for one in result.generated
        ],
        note=f"The first {len(shown)} of {len(result.prompts.prompts)} prompts{turn}. All images "
        f"of a row start from the same noise (seed {evaluation.seed}){guidance}{fresh}.",
    )


def _columns(evaluation: Evaluation) -> Iterator[ScoreColumn]:
    for result in evaluation.sets:
        for measure in evaluation.measures:
            yield ScoreColumn(
                f"{result.prompts.name}/{measure.key}",
                measure.title,
                result.prompts.name,
                measure.percent,
                measure.higher_is_better,
            )


def _score_rows(evaluation: Evaluation) -> Iterator[ScoreRow]:
    """One row a sampler, with its scores on every set; then real images."""
    if not evaluation.measures:
        return
    for first in evaluation.sets[0].generated:
        scores, intervals = {}, {}
        for result in evaluation.sets:
            label = first.by.label
            same = next((one for one in result.generated if one.by.label == label), None)
            for key, value in same.scores.items() if same else ():
                scores[f"{result.prompts.name}/{key}"] = value
            for key, ends in same.intervals.items() if same else ():
                intervals[f"{result.prompts.name}/{key}"] = ends
        yield ScoreRow(first.by.label, scores, first.kind, intervals)
    real = {f"{r.prompts.name}/{k}": v for r in evaluation.sets for k, v in r.real.items()}
    if real:
        yield ScoreRow("real images", real, "real")


def _highlights(evaluation: Evaluation) -> dict[str, str]:
    """The first set's headline scores against the teacher's."""
    first = evaluation.sets[0]
    student = first.find("student", _HEADLINE_STEPS)
    teacher = first.find("teacher", REFERENCE_STEPS)
    if student is None or teacher is None:
        return {}
    return {
        f"{measure.title}, {_HEADLINE_STEPS} steps of {REFERENCE_STEPS}": relative_text(
            ScoreColumn(measure.key, measure.title, higher_is_better=measure.higher_is_better),
            student.scores[measure.key],
            teacher.scores[measure.key],
        )
        for measure in evaluation.measures
    }
