"""Where a checkpoint's run stood, as the checkpoint says it, and which one a run goes on from."""

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from tlcm_jax.io.json_files import read_object
from tlcm_jax.training import integrity
from tlcm_jax.training.retention import Record

POSITION = "position"
# Of what a checkpoint holds. 1 had neither sums nor a format.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands, between two steps.

    Attributes:
      stage: index of the stage.
      name: its name.
      step: steps of the stage that are done. It is also the position in the stage's data: batch
        k is drawn for step k, so the next batch is number `step`.
      total: steps of all stages that are done; numbers checkpoints and metrics.
    """

    stage: int
    name: str
    step: int
    total: int


def describe(position: Position, record: Record, best: str) -> dict[str, Any]:
    """What a checkpoint says of itself, as JSON values; `best` is `Keep.best`."""
    rated = {"best": best, "metric": record.metric} if record.metric is not None else {}
    return {
        "format": FORMAT,
        **dataclasses.asdict(position),
        "stage_end": record.stage_end,
        **rated,
    }


def read_position(folder: Path) -> Position:
    """Where the run of a checkpoint stood.

    Args:
      folder: of the checkpoint; its name is its number.

    Raises:
      OSError, ValueError: it cannot be read, is of a newer format, or contradicts itself.
    """
    stored = _read(folder)
    found = stored.get("format", 1)
    if found not in (1, FORMAT):
        raise ValueError(
            f"it is of format {found!r}, and this version reads up to {FORMAT}: use the version of "
            "tlcm_jax that it was made with, or a newer one"
        )
    kinds = {"stage": int, "name": str, "step": int, "total": int}
    for name, kind in kinds.items():
        if type(stored.get(name)) is not kind:
            raise ValueError(f"its {name} is {stored.get(name)!r}")
    position = Position(**{name: stored[name] for name in kinds})
    total = int(folder.name)
    first = position.stage == 0
    if position.total != total or not 0 <= position.step <= total or position.stage < 0:
        raise ValueError(f"it says that it is of step {position.step}, {position.total} in all")
    if first and position.step != total:
        raise ValueError(f"it says that its first stage is at step {position.step}")
    return position


def read_record(folder: Path, best: str) -> Record | None:
    """What decides whether a checkpoint is kept; None if it cannot be read."""
    try:
        stored = _read(folder)
    except (OSError, ValueError):
        return None
    metric = stored.get("metric") if stored.get("best") == best else None
    return Record(
        total=int(folder.name),
        stage_end=stored.get("stage_end") is True,
        metric=metric if isinstance(metric, float) else None,
    )


def newest_whole(directory: Path, totals: Iterable[int]) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint that is what was saved, and what is wrong with each newer one.

    Where none has a list of sums, as older versions wrote them, it is the newest that says where
    it stands.

    Args:
      directory: of the checkpoints.
      totals: their numbers.

    Returns:
      The number, or None; and by number, in a few words, what is damaged.

    Raises:
      ValueError: the newest was written by a newer version.
    """
    damaged: dict[int, str] = {}
    unlisted = None
    for total in sorted(totals, reverse=True):
        folder = directory / str(total)
        if not integrity.has_sums(folder):
            damaged[total] = f"{integrity.SUMS} is missing"
            if unlisted is None and _readable(folder):
                unlisted = total
            continue
        reason = integrity.damage(folder)
        if not reason:
            try:
                read_position(folder)
            except (OSError, ValueError) as error:  # whole, so not for its age
                raise ValueError(f"checkpoint {folder} cannot be read: {error}") from None
            return total, damaged
        damaged[total] = reason
    if unlisted is None:
        return None, damaged
    logging.warning(
        "checkpoint %s has no %s: it is taken unchecked", directory / str(unlisted), integrity.SUMS
    )
    return unlisted, {total: why for total, why in damaged.items() if total > unlisted}


def newest_of_all(directory: Path, totals: Iterable[int]) -> tuple[int | None, dict[int, str]]:
    """As `newest_whole`; of several processes one looks, and all take what it found."""
    if jax.process_count() == 1:
        return newest_whole(directory, totals)
    found = np.full(2, -1, np.int32)
    damaged: dict[int, str] = {}
    if jax.process_index() == 0:
        total, damaged = newest_whole(directory, totals)
        found[:] = (-1 if total is None else total, max(damaged, default=-1))
    chosen, newest = map(int, multihost_utils.broadcast_one_to_all(found))
    if newest >= 0 and not damaged:
        damaged = {newest: "process 0 says why"}
    return (None if chosen < 0 else chosen), damaged


def set_aside(folder: Path) -> None:
    """Gives a damaged checkpoint a name that is no number, over what had it before."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)


def _readable(folder: Path) -> bool:
    try:
        read_position(folder)
    except (OSError, ValueError):
        return False
    return True


def _read(folder: Path) -> dict[str, Any]:
    return read_object(folder / POSITION / "metadata", "checkpoint")
