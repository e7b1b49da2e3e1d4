"""Does runs one after another, each in a process of its own, and skips those that are done."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results.runs import FAILURE, JOB, LOG, SCORES, STOPPED, Run
from tlcm_jax.interchange.files import whole
from tlcm_jax.reporting.provenance import duration

# Shown of a finished run, with the step count that the tables share.
HEADLINE = "4"
# What a stopped process is given to save in.
_PATIENCE = 120


def perform(teacher: Run, runs: Sequence[Run], tell: Callable[[str], None] = print) -> list[Run]:
    """Does the runs that are not done yet, the teacher's first.

    A run that fails leaves `failure.json` and the others go on; it is tried again, from its last
    checkpoint, by the next call. One that was killed goes on where it was.

    Args:
      teacher: what the students are compared with.
      runs: the students.
      tell: takes one line a run.

    Returns:
      Those that failed.

    Raises:
      RuntimeError: the teacher's run failed, and nothing can be compared.
    """
    if teacher.scores() is None:
        _check(_perform(teacher, teacher.folder), teacher)
    left = [run for run in runs if run.scores() is None]
    if len(left) < len(runs):
        tell(f"{len(runs) - len(left)} of {len(runs)} runs are done")
    took: list[float] = []
    failed = []
    for number, run in enumerate(left, 1):
        start = time.monotonic()
        message = _perform(run, teacher.folder)
        took.append(time.monotonic() - start)
        if message:
            failed.append(run)
        rest = sum(took) / len(took) * (len(left) - number)
        tell(
            f"[{number}/{len(left)}] {run.label}: {message or _headline(run)} "
            f"({duration(took[-1])}; about {duration(rest)} left)"
        )
    return failed


def _perform(run: Run, teacher: Path) -> str:
    """Runs one process to its end; returns why it failed, or ""."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for old in (FAILURE, SCORES):
        (run.folder / old).unlink(missing_ok=True)
    _write(run.folder / JOB, run.job)
    command = [sys.executable, "-m", "benchmarks.results.job", str(run.folder), str(teacher)]
    with (run.folder / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            code = process.wait()
        except BaseException:  # whatever ends this command ends the run, which saves first
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code == STOPPED:
        raise KeyboardInterrupt(f"{run.label} was asked to stop")
    if not code and run.scores() is not None:
        return ""
    message = _why(code, run.folder / LOG)
    _write(run.folder / FAILURE, {"message": message})
    return f"failed: {message}"


def _why(code: int, log: Path) -> str:
    """The last line of a process's log, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ")[:500] if lines else f"exit status {code}"


def _headline(run: Run) -> str:
    scores = (run.scores() or {}).get("scores", {}).get("student", {}).get(HEADLINE, {})
    return ", ".join(f"{key} {value:.3f}" for key, value in scores.items()) or "done"


def _check(message: str, teacher: Run) -> None:
    if message:
        raise RuntimeError(f"the teacher {message}; see {teacher.folder / LOG}")


def _write(path: Path, value: dict) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
