"""Updates that are not finite: skipped by `training.update`, and counted here.

Too many in a row end the run with a file that says what the last of them was made of.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from tlcm_jax.training.positions import Position
from tlcm_jax.training.sharding import leaf_name
from tlcm_jax.training.stage import Stage
from tlcm_jax.training.state import TrainState
from tlcm_jax.training.workdir import write_atomically

REPORT = "nonfinite.json"
IN_A_ROW = "skipped_in_a_row"


class NonFiniteError(RuntimeError):
    """Too many updates in a row were not finite.

    Attributes:
      step: over all stages, of the last of them.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Skipped:
    """Counts a stage's updates that were skipped one after the other, row by row."""

    def __init__(self, limit: int, steps: int, rows: Sequence[Mapping[str, Any]]):
        """Goes on from a resumed stage's last row.

        Args:
          limit: so many in a row end the run.
          steps: of the stage; one of fewer steps than the limit ends when all are skipped.
          rows: of the stage so far.
        """
        self._limit = min(limit, steps)
        self.in_a_row = int(rows[-1].get(IN_A_ROW) or 0) if rows else 0
        self._recent: deque[Mapping[str, float]] = deque(maxlen=self._limit)

    def add(self, updates: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Takes a row's updates, in order; what the row says of them, if any was skipped."""
        for update in updates:
            self.in_a_row = 0 if update["finite"] else self.in_a_row + 1
            if not update["finite"]:
                self._recent.append(update)
        skipped = sum(not update["finite"] for update in updates)
        return {"skipped": skipped, IN_A_ROW: self.in_a_row} if skipped else {}

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return self.in_a_row >= self._limit

    def report(
        self, stage: Stage, state: TrainState, position: Position, folder: Path
    ) -> NonFiniteError:
        """Writes `nonfinite.json` of the last update, and says so.

        Args:
          stage: with the pairs of that update at hand.
          state: after it; every process must call this.
          position: after it.
          folder: the workdir.
        """
        spec, step = stage.spec, position.step
        pairs = stage.stream.next(step - 1, state, spec.frozen)
        count = spec.pairs.batch_size
        numbers = {
            leaf_name(path): _host(leaf).tolist()
            for path, leaf in jax.tree_util.tree_leaves_with_path(pairs)
            if leaf.shape == (count,)
        }
        recent = [u for u in self._recent if not u["finite"]][-self.in_a_row :]
        content = {
            "stage": spec.name,
            "stage_step": step,
            "step": position.total,
            "skipped_in_a_row": self.in_a_row,
            "loss": [_number(update["loss"]) for update in recent],
            "grad_norm": [_number(update["grad_norm"]) for update in recent],
            "pairs": numbers,
            "prompts": stage.stream.prompts(step - 1, state.key),
        }
        path = folder / REPORT
        if jax.process_index() == 0:
            write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return NonFiniteError(
            f"stage {spec.name!r}, step {step}: the loss, its gradient or the update was not "
            f"finite {self.in_a_row} times in a row (each was skipped). {path} names the prompts, "
            "times and gradient norms. Try a lower learning rate or a longer warm-up",
            position.total,
        )


def say_skipped(stage: str, step: int, row: Mapping[str, Any]) -> None:
    """Warns of a row with skipped updates."""
    if row.get("skipped"):
        logging.warning(
            "stage %s, up to step %d: %d of %d updates were not finite and were skipped",
            stage,
            step,
            row["skipped"],
            row["steps"],
        )


def _host(leaf: jax.Array) -> np.ndarray:
    if jax.process_count() > 1:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _number(value: float) -> float | str:
    """JSON has no name for what is not finite."""
    return value if np.isfinite(value) else str(value)
