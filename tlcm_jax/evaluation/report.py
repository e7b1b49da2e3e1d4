"""An evaluation for people and programs: `metrics.json`, `report.html` and contact sheets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.evaluation.evaluate import REFERENCE_STEPS, Evaluation, SetResult
from tlcm_jax.evaluation.reporting.contents import (
    Curve,
    PictureGrid,
    PictureRow,
    Report,
    ScoreColumn,
    ScoreRow,
)
from tlcm_jax.evaluation.reporting.pictures import contact_sheet
from tlcm_jax.evaluation.reporting.report import relative_text, write_report
from tlcm_jax.io.files import atomic_write

_TITLES = {"heldout": "held-out prompts", "composition": "unseen object-style pairs"}
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
      evaluation: what was drawn and scored.
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
    reference = f"teacher, {REFERENCE_STEPS} steps"
    return Report(
        title=title,
        summary=summary,
        highlights={**_highlights(evaluation), **(highlights or {})},
        grids=[picture_grid(evaluation, result, pictures) for result in evaluation.sets],
        scores=rows,
        columns=list(_columns(evaluation)),
        reference=reference if reference in labels else None,
        curves=curves,
        config=config or {},
        provenance=provenance or {},
    )


def save(folder: Path, evaluation: Evaluation, report: Report) -> None:
    """Writes `metrics.json`, `report.html`, and for each prompt set `samples/NAME.png`.

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
    with atomic_write(folder / "report.html") as part:
        write_report(part, report)


def picture_grid(evaluation: Evaluation, result: SetResult, count: int) -> PictureGrid:
    """Some prompts of a set, by every sampler."""
    shown = chosen(result.prompts, count)
    scale = evaluation.guidance_scale
    guidance = "" if scale is None else f"; the teacher with guidance {scale:g}"
    return PictureGrid(
        title=_title(result).capitalize(),
        prompts=[result.prompts.prompts[i] for i in shown],
        rows=[
            PictureRow(f"{d.steps} step{'s' if d.steps > 1 else ''}", d.pictures[shown], d.kind)
            for d in result.drawn
        ],
        note="The first prompts of the file, each style in turn. All pictures of a row start from "
        f"the same noise (seed {evaluation.seed}){guidance}.",
    )


def chosen(prompts: PromptSet, count: int) -> np.ndarray:
    """Which prompts are shown: the first ones, of each style in turn where styles are known."""
    total = len(prompts.prompts)
    styles = list(prompts.annotations.get("style", [""] * total))
    turn: dict[Any, int] = {}
    order = []
    for index, style in enumerate(styles):
        turn[style] = turn.get(style, -1) + 1
        order.append((turn[style], index))
    return np.array([index for _, index in sorted(order)[:count]])


def _title(result: SetResult) -> str:
    return _TITLES.get(result.prompts.name, result.prompts.name)


def _columns(evaluation: Evaluation) -> Iterator[ScoreColumn]:
    for result in evaluation.sets:
        for measure in evaluation.measures:
            yield ScoreColumn(
                f"{result.prompts.name}/{measure.key}",
                measure.title,
                _title(result),
                measure.percent,
                measure.higher_is_better,
            )


def _score_rows(evaluation: Evaluation) -> Iterator[ScoreRow]:
    """One row a sampler, with its scores on every set; then real pictures."""
    if not evaluation.measures:
        return
    for first in evaluation.sets[0].drawn:
        scores = {}
        for result in evaluation.sets:
            drawn = result.find(first.kind, first.steps)
            for key, value in drawn.scores.items() if drawn else ():
                scores[f"{result.prompts.name}/{key}"] = value
        yield ScoreRow(first.label, scores, first.kind)
    real = {f"{r.prompts.name}/{k}": v for r in evaluation.sets for k, v in r.real.items()}
    if real:
        yield ScoreRow("real pictures", real, "real")


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
