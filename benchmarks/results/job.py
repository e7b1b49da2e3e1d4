"""One run, in a process of its own: distils, draws, scores, and leaves `scores.json`.

    python -m benchmarks.results.job FOLDER

FOLDER holds `job.json`.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from benchmarks.results import budget
from benchmarks.results.measure import Measured, measure
from benchmarks.results.runs import JOB, PICTURES, SCORES, STOPPED, TEACHER, Asked
from tlcm_jax.config.run import train
from tlcm_jax.config.schema import Settings, read
from tlcm_jax.evaluation.reporting.provenance import provenance
from tlcm_jax.families.load import load_model
from tlcm_jax.io.files import atomic_write
from tlcm_jax.training import compilation


def main(arguments: Sequence[str]) -> None:
    """Works; anything wrong ends the process with one line that says what."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    folder = Path(arguments[1])
    compilation.use_cache()
    try:
        work(folder)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def work(folder: Path) -> None:
    """Does what the folder's `job.json` says."""
    start = time.monotonic()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    asked = Asked(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["asked"].items()})
    settings = read(job["config"])
    spent: dict[str, Any] = {}
    if job["name"] == TEACHER:
        measured = measure(load_model(settings.model.path), asked, teacher=True)
    else:
        run = train(job["config"], folder, progress=False)
        if not run.completed:
            sys.exit(STOPPED)
        spent = accounts(settings, run.history)
        measured = measure(run.model, asked, lora=run.adapter)
    with atomic_write(folder / PICTURES) as part, part.open("wb") as file:
        np.savez_compressed(file, **measured.pictures)
    found = _told(job, measured, spent, time.monotonic() - start)
    with atomic_write(folder / SCORES) as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def accounts(settings: Settings, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run has spent, from its rows of metrics; those before a resumption are among them.

    Returns:
      `forwards` and `backwards` (the student's) of UNets; `training_seconds`, compilation
      included, of which `first_step_seconds` is that of the first step of each stage.
    """
    found = budget.costs(settings)
    forwards = backwards = seconds = first = 0.0
    for row in history:
        pairs, cost = row["pairs"], found[row["stage"]]
        forwards += pairs * cost.forwards
        backwards += pairs * cost.backwards
        begun = row.get("first_step_seconds")
        first += begun or 0.0
        if row.get("pairs_per_second"):
            timed = row["steps"] - (begun is not None)
            seconds += timed * cost.pairs / row["pairs_per_second"]
    return {
        "forwards": forwards,
        "backwards": backwards,
        "training_seconds": seconds + first,
        "first_step_seconds": first,
    }


def _told(
    job: Mapping[str, Any], measured: Measured, spent: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "name": job["name"],
        "seed": job["seed"],
        "asked": job["asked"],
        "scores": measured.scores,
        "real": dict(measured.real),
        "prompts": measured.prompts,
        "unseen": measured.unseen,
        "shown": list(measured.shown),
        **spent,
        "seconds": {key: round(value, 1) for key, value in measured.seconds.items()},
        "provenance": provenance(seconds),
    }


if __name__ == "__main__":
    main(sys.argv)
