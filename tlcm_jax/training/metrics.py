"""What a run reports: `metrics.jsonl`, TensorBoard events and a progress bar.

Metrics stay on the device until a row is due; only then does the host wait for them. A row
covers the steps since the one before it.
"""

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tlcm_jax.training.workdir import is_full, write_atomically

METRICS_FILE = "metrics.jsonl"
Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard when TensorFlow is installed.

    Attributes:
      history: the rows of the file, those of the run it continues included.
    """

    def __init__(self, workdir: str | os.PathLike, write: bool = True):
        """Opens the file.

        Args:
          workdir: the run's folder; made if it is missing.
          write: False keeps only the history; for all processes but one.
        """
        self.history: list[Row] = []
        self._write = write
        self._path = Path(workdir) / METRICS_FILE
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
        self.history.append(row)
        if not self._write:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            if not is_full(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {self._path}: free some and run the same command to "
                f"resume from the last checkpoint",
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

    def collect(self) -> tuple[Row, int | None]:
        """Waits for the row's steps, and begins the next row.

        Returns:
          The row: mean of every metric over the steps, `grad_norm_max`, the `steps` and `pairs`
          it covers, `pairs_per_second` and `nfe_per_second` where a timed step is among them, and
          `first_step_seconds` once; and the index in the row of the first step that was not
          finite, or None.
        """
        values = jax.device_get(self._pending)
        seconds = time.perf_counter() - (self._started or time.perf_counter())
        finite = [bool(value.pop("finite")) for value in values]
        row: Row = {}
        for name in values[0]:
            column = np.asarray([value[name] for value in values], np.float64)
            row[name] = float(column.mean())
            if name == "grad_norm":
                row["grad_norm_max"] = float(column.max())
        row["steps"], row["pairs"] = len(values), len(values) * self._batch_size
        timed = (len(values) - self._untimed) * self._batch_size
        if timed and seconds > 0:
            row["pairs_per_second"] = timed / seconds
            row["nfe_per_second"] = self._nfe * timed / seconds
        if self._untimed:
            row["first_step_seconds"] = self._first_seconds
        self._pending, self._started, self._untimed = [], None, 0
        return row, (finite.index(False) if False in finite else None)


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
            desc=name, initial=done, total=steps, disable=not show, unit="step", dynamic_ncols=True
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


def _line(row: Row) -> str:
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(clean, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[Row]:
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no row of metrics")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            # Only the last line can be half written, by a run that was killed.
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}, is not JSON of a row: move the file away"
                ) from error
    return rows


def _tensorboard(workdir: str | os.PathLike) -> Any:
    try:
        from clu import metric_writers  # imports TensorFlow
    except ImportError:
        return None
    return metric_writers.SummaryWriter(os.fspath(workdir))
