"""What a run reports: `metrics.jsonl`, TensorBoard events and a progress bar.

Metrics stay on the device until a row is due; only then does the host wait for them. A row
covers the steps since the one before it.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from tlcm_jax.training.workdir import is_full, write_atomically

METRICS_FILE = "metrics.jsonl"
Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard when TensorFlow is installed.

    Attributes:
      folder: the run's.
      history: the rows of the file, those of the run it continues included.
    """

    def __init__(self, workdir: str | os.PathLike, write: bool = True):
        """Opens the file.

        Args:
          workdir: the run's folder; made if it is missing.
          write: False keeps only the history; for all processes but one.
        """
        self.folder = Path(workdir)
        self.history: list[Row] = []
        self._write = write
        self._path = self.folder / METRICS_FILE
        self._events = None
        if write:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._events = _tensorboard(workdir)

    def resume(self, total: int) -> None:
        """Drops rows beyond a restored step: the run will write them again.

        Args:
          total: steps done at the checkpoint that is resumed, 0 for a new run.
        """
        rows = _read(self._path) if self._path.exists() else []
        self.history = [row for row in rows if row["step"] <= total]
        if self._write:
            write_atomically(self._path, "".join(_line(row) for row in self.history))

    def write(self, row: Row) -> None:
        """Appends a row.

        Args:
          row: `step` (over all stages) and values; floats that are not finite are written as
            null, since JSON has no name for them.

        Raises:
          OSError: no space is left.
        """
        # As it will be read back: what looks at the rows decides the same after a resume.
        row = _clean(row)
        self.history.append(row)
        if not self._write:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            reason = "no space left" if is_full(error) else error.strerror
            raise OSError(
                error.errno,
                f"{reason}: cannot write {self._path}; mend that and run the same command to "
                "resume from the last checkpoint",
            ) from error
        if self._events is not None:
            scalars = {
                name: value
                for name, value in row.items()
                if isinstance(value, float) and math.isfinite(value)
            }
            self._events.write_scalars(row["step"], scalars)

    def close(self) -> None:
        """Flushes what TensorBoard has not been given yet."""
        if self._events is not None:
            self._events.close()


class Meter:
    """Collects the steps of a row without waiting for the device, and times them."""

    def __init__(self, nfe_per_pair: float, batch_size: int):
        """Starts with an empty row.

        Args:
          nfe_per_pair: network forwards that a pair costs.
          batch_size: pairs of a step.
        """
        self._nfe, self._batch_size = nfe_per_pair, batch_size
        self._pending: list[dict[str, Any]] = []  # jax.Array, whose stub lacks is_ready
        self._started: float | None = None
        self._untimed = 0
        self._first_seconds: float | None = None

    def start(self) -> None:
        """Starts the clock before a step; call it before each."""
        if self._started is None:
            self._started = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, on the device.

        The first step includes compilation: it is waited for and timed by itself.
        """
        self._pending.append(metrics)
        if self._first_seconds is None and self._started is not None:
            jax.block_until_ready(metrics)
            now = time.perf_counter()
            self._first_seconds = now - self._started
            self._started, self._untimed = now, 1

    def ready(self) -> int:
        """How many of the row's steps the device has finished; does not wait."""
        return sum(metrics["loss"].is_ready() for metrics in self._pending)

    def collect(self) -> tuple[Row, list[dict[str, Any]]]:
        """Waits for the row's steps, and begins the next row.

        Returns:
          The row: mean of every metric over the steps that were finite (NaN if none was),
          `grad_norm_max`, the `steps` and `pairs` it covers, `pairs_per_second` and
          `nfe_per_second` where a timed step is among them, and `first_step_seconds` once; and
          each step's `loss`, `grad_norm` and `finite`.
        """
        values = jax.device_get(self._pending)
        seconds = time.perf_counter() - (self._started or time.perf_counter())
        finite = np.array([value.pop("finite") for value in values], bool)
        columns = {name: np.asarray([v[name] for v in values], np.float64) for name in values[0]}
        steps = [
            {"loss": float(loss), "grad_norm": float(norm), "finite": bool(good)}
            for loss, norm, good in zip(columns["loss"], columns["grad_norm"], finite, strict=True)
        ]
        row: Row = {}
        for name, column in columns.items():
            done = column[finite] if finite.any() else np.array([np.nan])
            row[name] = float(done.mean())
            if name == "grad_norm":
                row["grad_norm_max"] = float(done.max())
        row["steps"], row["pairs"] = len(values), len(values) * self._batch_size
        timed = (len(values) - self._untimed) * self._batch_size
        if timed and seconds > 0:
            row["pairs_per_second"] = timed / seconds
            row["nfe_per_second"] = self._nfe * timed / seconds
        if self._untimed:
            row["first_step_seconds"] = self._first_seconds
        self._pending, self._started, self._untimed = [], None, 0
        return row, steps


def redraw_seconds() -> float:
    """How often a progress bar is drawn; a file keeps each, so there every five minutes."""
    return 0.1 if sys.stderr.isatty() else 300.0


class Progress:
    """A progress bar of one stage: steps done, ETA, loss and throughput."""

    def __init__(self, name: str, done: int, steps: int, show: bool = True):
        """Draws the bar on standard error.

        Args:
          name: the stage.
          done: steps done before (a resumed stage).
          steps: steps of the stage.
          show: False draws nothing.
        """
        self._bar = tqdm(
            desc=name,
            initial=done,
            total=steps,
            disable=not show,
            unit="step",
            dynamic_ncols=True,
            mininterval=redraw_seconds(),
            maxinterval=max(10.0, redraw_seconds()),
        )
        self._settled = done

    def at(self, unsettled: int) -> None:
        """Moves to the last row's end plus the steps since that the device has finished."""
        self._bar.update(self._settled + unsettled - self._bar.n)

    def settle(self, row: Row) -> None:
        """Moves to the end of a row and shows its loss and throughput."""
        self._settled += row["steps"]
        shown = {"loss": f"{row['loss']:.4g}"}
        if "pairs_per_second" in row:
            shown["pairs/s"] = f"{row['pairs_per_second']:.3g}"
            shown["NFE/s"] = f"{row['nfe_per_second']:.3g}"
        self._bar.set_postfix(shown, refresh=False)
        self.at(0)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


def _clean(row: Row) -> Row:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[Row]:
    """The rows of a file; one that holds anything else is kept beside it for its reader."""
    content = path.read_bytes()
    lines = content.split(b"\n")
    read = [_row(line) for line in lines if line.strip()]
    rows = [row for row in read if row is not None]
    # Only the last line can be half written, by a run that was killed.
    if None in read[:-1]:
        aside = path.with_name(path.name + ".damaged")
        aside.write_bytes(content)
        logging.warning(
            "%s holds %d lines that are no rows: left out, and the file as it was is kept as %s",
            path, read[:-1].count(None), aside.name,
        )  # fmt: skip
    return rows


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int
    return row if whole and isinstance(row.get("stage"), str) else None


def _tensorboard(workdir: str | os.PathLike) -> Any:
    try:
        from clu import metric_writers  # imports TensorFlow
    except ImportError:
        return None
    return metric_writers.SummaryWriter(os.fspath(workdir))
