"""Which checkpoints a run keeps."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """What is kept; one that any of these names stays.

    Attributes:
      last: the newest so many, at least 1.
      every: those whose number of steps over all stages is a multiple of it; 0 keeps none so.
      stage_ends: each stage's last one.
      best: a metric of the rows, whose least value is kept, or, written `-METRIC`, whose greatest;
        "" keeps none so.
    """

    last: int = 2
    every: int = 0
    stage_ends: bool = False
    best: str = ""

    def __post_init__(self) -> None:
        """Refuses a policy that keeps nothing to resume from."""
        if self.last < 1 or self.every < 0:
            raise ValueError(
                f"keep at least the last checkpoint, and every 0 (none) or more steps; got "
                f"{self.last} and {self.every}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint says of itself.

    Attributes:
      total: its number.
      stage_end: whether it is a stage's last.
      metric: the value that `Keep.best` names, of the row that ends there; None if it has none.
    """

    total: int
    stage_end: bool = False
    metric: float | None = None


def metric_of(row: Mapping[str, Any], keep: Keep) -> float | None:
    """The value of a row that decides what is best."""
    value = row.get(keep.best.removeprefix("-")) if keep.best else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def surplus(records: Sequence[Record], keep: Keep) -> list[int]:
    """The numbers of those that may go."""
    newest_first = sorted(records, key=lambda record: -record.total)
    stay = {record.total for record in newest_first[: keep.last]}
    if keep.every:
        stay |= {record.total for record in records if record.total % keep.every == 0}
    if keep.stage_ends:
        stay |= {record.total for record in records if record.stage_end}
    sign = -1 if keep.best.startswith("-") else 1
    rated = [(sign * r.metric, -r.total) for r in records if r.metric is not None]
    if keep.best and rated:
        stay.add(-min(rated)[1])
    return sorted({record.total for record in records} - stay)
