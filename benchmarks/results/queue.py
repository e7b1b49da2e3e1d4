"""Does runs, each in a process of its own, and skips those that are done.

On a CPU, processes side by side do more than one after another: much of a run is compilation,
which uses one core, and a small network's steps use several badly. Two runs of the miniature on
one core each make 1.46 times the evaluations a second of one run on both.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results.runs import FAILURE, JOB, LOG, SCORES, STOPPED, Run
from tlcm_jax.evaluation.reporting.provenance import duration
from tlcm_jax.io.files import atomic_write

# Shown of a finished run, with the step count that the tables share.
HEADLINE = "4"
_TOLD = ("all_checks", "unseen", "malformed", "open_attributes")
# What a stopped process is given to save in.
_PATIENCE = 120
# How often processes are looked at.
_PAUSE = 0.5


@dataclass(frozen=True, eq=False)
class _Started:
    run: Run
    process: subprocess.Popen
    cores: frozenset[int]
    at: float = field(default_factory=time.monotonic)


def perform(
    teachers: Mapping[int, Run],
    runs: Sequence[Run],
    tell: Callable[[str], None] = print,
    *,
    jobs: int = 1,
) -> list[Run]:
    """Does the runs that are not done yet, after those of the teachers of their seeds.

    A run that fails leaves `failure.json` and the others go on; it is tried again, from its last
    checkpoint, by the next call. One that was killed goes on where it was.

    Args:
      teachers: of the rows beside which the students of a seed stand.
      runs: the students.
      tell: takes one line a run.
      jobs: how many run at a time, each on its part of the cores.

    Returns:
      Those that failed.

    Raises:
      RuntimeError: a teacher's run failed, and nothing can be compared.
      ValueError: more jobs than there are cores.
    """
    cores = _shared_out(jobs)
    needed = [teachers[seed] for seed in dict.fromkeys(run.seed for run in runs)]
    for teacher, message, _ in _finished([t for t in needed if t.scores() is None], cores):
        if message:
            raise RuntimeError(f"the {teacher.label}: {message}; see {teacher.folder / LOG}")
    left = [run for run in runs if run.scores() is None]
    if len(left) < len(runs):
        tell(f"{len(runs) - len(left)} of {len(runs)} runs are done")
    start = time.monotonic()
    failed = []
    for number, (run, message, seconds) in enumerate(_finished(left, cores), 1):
        if message:
            failed.append(run)
        rest = (time.monotonic() - start) / number * (len(left) - number)
        tell(
            f"[{number}/{len(left)}] {run.label}: {message or _headline(run)} "
            f"({duration(seconds)}; about {duration(rest)} left)"
        )
    return failed


def _shared_out(jobs: int) -> list[frozenset[int]]:
    """The cores of this process in as many parts, the first of them the larger ones."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if jobs == 1:
        return [frozenset(mine)]
    if not 1 <= jobs <= len(mine):
        raise ValueError(f"jobs = {jobs}: give 1 to {max(1, len(mine))}, a core each")
    return [frozenset(mine[i::jobs]) for i in range(jobs)]


def _finished(
    runs: Sequence[Run], cores: Sequence[frozenset[int]]
) -> Iterator[tuple[Run, str, float]]:
    """Runs in order, one a part of the cores, and yields them as they end.

    Args:
      runs: what is to be done.
      cores: the parts.

    Yields:
      The run, why it failed or "", and its seconds.
    """
    waiting, free = list(runs), list(cores)
    going: list[_Started] = []
    try:
        while waiting or going:
            while waiting and free:
                going.append(_start(waiting.pop(0), free.pop(0)))
            time.sleep(_PAUSE)
            for one in [one for one in going if one.process.poll() is not None]:
                going.remove(one)
                free.append(one.cores)
                yield one.run, _ended(one), time.monotonic() - one.at
    except BaseException:  # whatever ends this command ends the runs, which save first
        _end(going)
        raise


def _start(run: Run, cores: frozenset[int]) -> _Started:
    run.folder.mkdir(parents=True, exist_ok=True)
    for old in (FAILURE, SCORES):
        (run.folder / old).unlink(missing_ok=True)
    _write(run.folder / JOB, run.job)
    command = [sys.executable, "-m", "benchmarks.results.job", str(run.folder)]
    with (run.folder / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return _Started(run, process, cores)


def _ended(one: _Started) -> str:
    """Why a process that has ended failed, or ""."""
    code, run = one.process.returncode, one.run
    if code == STOPPED:
        raise KeyboardInterrupt(f"{run.label} was asked to stop")
    if not code and run.scores() is not None:
        return ""
    message = _why(code, run.folder / LOG)
    _write(run.folder / FAILURE, {"message": message})
    return f"failed: {message}"


def _end(going: Sequence[_Started]) -> None:
    for one in going:
        one.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for one in going:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()


def _why(code: int, log: Path) -> str:
    """The last line of a process's log, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ")[:500] if lines else f"exit status {code}"


def _headline(run: Run) -> str:
    scores = (run.scores() or {}).get("scores", {}).get("student", {}).get(HEADLINE, {})
    told = ", ".join(f"{key} {scores[key]:.3f}" for key in _TOLD if key in scores)
    return told or "done"


def _write(path: Path, value: dict) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
