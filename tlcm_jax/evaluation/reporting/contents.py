"""The parts of a report as plain frozen data: images, scores, curves, and the report of them.

Checked when built, so that a mistake is found where it is made and not in a browser.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

Kind = Literal["student", "teacher", "baseline", "real"]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRow:
    """Images of all prompts of a grid by one sampler, one column of the report.

    Attributes:
        label: the sampler, for example "4 steps".
        images: image i for prompt i.
        kind: whose images they are; neighbours of different kinds are set apart.
    """

    label: str
    images: UInt8[np.ndarray, "n h w 3"]
    kind: Kind = "student"

    def __post_init__(self) -> None:
        shape, dtype = np.shape(self.images), getattr(self.images, "dtype", None)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(
                f"images of {self.label!r} must be uint8 [n, h, w, 3]; got {dtype} {shape}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageGrid:
    """The same prompts and seeds by several samplers.

    Attributes:
        title: heading of the grid.
        prompts: n prompts; any text, it is escaped where it is drawn.
        rows: one a sampler, each with n images.
        note: a sentence under the heading, for example the seeds.
    """

    title: str
    prompts: Sequence[str]
    rows: Sequence[ImageRow]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.prompts or not self.rows:
            raise ValueError(f"grid {self.title!r} needs at least one prompt and one row")
        for row in self.rows:
            if len(row.images) != len(self.prompts):
                raise ValueError(
                    f"grid {self.title!r} has {len(self.prompts)} prompts, but row "
                    f"{row.label!r} has {len(row.images)} images"
                )


@dataclasses.dataclass(frozen=True)
class ScoreColumn:
    """One column of the score table.

    Attributes:
        key: the name under which rows hold the score.
        title: heading.
        group: heading over neighbouring columns of the same group; empty for none.
        percent: a share in 0..1, drawn as a percentage; otherwise a plain number.
        higher_is_better: False for distances.
    """

    key: str
    title: str
    group: str = ""
    percent: bool = False
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """The scores of one sampler, or of real images.

    Attributes:
        label: for example "student, 4 steps".
        scores: by `ScoreColumn.key`; an absent or NaN score is drawn as a dash.
        kind: whose scores they are.
        intervals: low and high, 95 %, of the scores whose are known, by key.
    """

    label: str
    scores: Mapping[str, float | None]
    kind: Kind = "student"
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def score(self, key: str) -> float | None:
        """The score under `key`, or None where there is none."""
        value = self.scores.get(key)
        return None if value is None or math.isnan(value) else float(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One measured quantity over the steps of one stage.

    Attributes:
        stage: curves of a stage stand side by side.
        title: what is measured, for example "loss".
        steps: [n] optimiser steps.
        values: [n]; a value that is not finite leaves a gap.
        unit: of the values, for example "samples/s".
        log: logarithmic value axis.
    """

    stage: str
    title: str
    steps: Sequence[float]
    values: Sequence[float]
    unit: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"curve {self.title!r} of {self.stage} has {len(self.steps)} steps "
                f"and {len(self.values)} values"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything that a report shows; every part but the title may be empty.

    Attributes:
        title: heading of the page.
        summary: one or two sentences under it.
        highlights: label -> short text, drawn large at the top.
        grids: images.
        scores: rows of the score table, in order.
        columns: columns of the table; those in which no row has a score are left out.
        reference: label of the row that the others are compared with (the teacher), or None.
        curves: loss, throughput, ...
        config: the run's config, nested mappings allowed.
        provenance: label -> text: versions, hardware, duration (see `provenance.provenance`).
    """

    title: str
    summary: str = ""
    highlights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grids: Sequence[ImageGrid] = ()
    scores: Sequence[ScoreRow] = ()
    columns: Sequence[ScoreColumn] = ()
    reference: str | None = None
    curves: Sequence[Curve] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = [row.label for row in self.scores]
        if self.reference is not None and self.reference not in labels:
            raise ValueError(
                f"reference {self.reference!r} is no row of the scores: choose one of {labels}"
            )

    @property
    def shown_columns(self) -> list[ScoreColumn]:
        """The columns in which some row has a score."""
        return [c for c in self.columns if any(row.score(c.key) is not None for row in self.scores)]
