"""Numbers of several seeds as the page shows them: a mean, and how far the seeds spread."""

import math
import statistics
from collections.abc import Sequence

from tlcm_jax.evaluation.scorers.base import Measure

NOTHING = "–"


def number(values: Sequence[float | None], measure: Measure) -> str:
    """`mean ± standard deviation`; the mean alone of a single seed, a dash of none.

    Args:
      values: of the seeds; None, NaN and infinite ones are left out.
      measure: shares become percentages.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return NOTHING
    factor = 100 if measure.percent else 1
    mean = factor * statistics.fmean(known)
    digits = _digits(mean, measure)
    if len(known) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {factor * statistics.stdev(known):.{digits}f}"


def difference(values: Sequence[float | None], measure: Measure) -> str:
    """`mean ± standard error` of differences by seed, bold beyond two; a dash of fewer than two.

    Args:
      values: of the seeds; None, NaN and infinite ones are left out.
      measure: shares become points.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return NOTHING
    factor = 100 if measure.percent else 1
    mean = factor * statistics.fmean(known)
    error = factor * statistics.stdev(known) / math.sqrt(len(known))
    digits = 1 if measure.percent else 3
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def thousands(values: Sequence[float]) -> str:
    """The mean in thousands; a dash of none."""
    return f"{statistics.fmean(values) / 1000:.1f}" if values else NOTHING


def minutes(values: Sequence[float]) -> str:
    """The mean of seconds, in minutes; a dash of none."""
    return f"{statistics.fmean(values) / 60:.1f}" if values else NOTHING


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column text and the others numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = []
    for row in (header, rule, *rows):
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)}: {row}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return lines


def _digits(mean: float, measure: Measure) -> int:
    """One after the point for percentages and numbers above ten, three for small ones."""
    return 1 if measure.percent or abs(mean) >= 10 else 3
