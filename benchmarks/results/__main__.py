"""Regenerates the page of results: runs what is missing, then writes it.

    python -m benchmarks.results --output docs/results.md --workdir runs/results
    python -m benchmarks.results ... --seeds 0,1,2 --budget 0.3   # three seeds, fewer evaluations
    python -m benchmarks.results ... --only recipes,literal       # a table, and one experiment
    python -m benchmarks.results ... --jobs 2                     # two runs at a time, a core each
    python -m benchmarks.results ... --rewrite                    # the page alone, runs nothing

The same command resumes: runs that have scores are skipped, one that was stopped goes on from its
last checkpoint, and one that failed is tried again. A changed recipe, budget or teacher is another
run. `--budget 0.015 --limit 4` in a workdir of its own is a few updates of every row.
`commentary.md` in a folder of the page's name is a person's; its figures are names that `prose.py`
looks up in the tables.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.results import ablation, improvements, recipes
from benchmarks.results.experiment import Table
from benchmarks.results.page import collect, commentary_beside, compared, page
from benchmarks.results.queue import perform
from benchmarks.results.runs import Plan, Run, plan
from benchmarks.results.sheets import write_sheets
from tlcm_jax.io.files import atomic_write

TABLES = (
    recipes.RECIPES,
    ablation.LADDER,
    ablation.SETTINGS,
    improvements.STAGES,
    improvements.PARTS,
)


def main(arguments: Sequence[str] | None = None, tables: Sequence[Table] = TABLES) -> None:
    """Does what the arguments say; ends with an error if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=_numbers, default=(0, 1, 2), help="such as 0,1,2")
    parser.add_argument(
        "--budget", type=float, default=1.0, help="share of the default recipe's evaluations"
    )
    parser.add_argument("--only", type=_words, default=(), help="experiments or tables to run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, cores shared out")
    parser.add_argument("--limit", type=int, default=0, help="prompts that are scored; 0: all")
    parser.add_argument("--rewrite", action="store_true", help="write the page, run nothing")
    args = parser.parse_args(arguments)
    try:
        planned = plan(tables, args.workdir, args.seeds, args.budget, args.limit)
        chosen = selected(tables, planned, args.only)
    except ValueError as error:
        sys.exit(f"results: {error}")
    for name, why in {**planned.absent, **planned.waiting}.items():
        print(f"{name}: left out, {why}", flush=True)
    failed: list[Run] = []
    if not args.rewrite:
        signal.signal(signal.SIGTERM, _stop)
        try:
            failed = perform(
                planned.teachers, chosen, lambda line: print(line, flush=True), jobs=args.jobs
            )
        except (RuntimeError, ValueError) as error:
            sys.exit(f"results: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped; the same command resumes")
    write(tables, planned, args.output, command(args))
    print(f"{args.output}; {len(failed)} runs failed" if failed else args.output)
    if failed:
        sys.exit(1)


def write(tables: Sequence[Table], planned: Plan, output: Path, words: Sequence[str]) -> None:
    """Writes the page and its contact sheets from what the folders hold."""
    found = collect(planned)
    tables = compared(tables, found)
    sheets = write_sheets(tables, planned, output.with_suffix(""))
    text = page(
        tables,
        planned,
        found,
        command=words,
        commentary=commentary_beside(output),
        sheets=sheets,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as part:
        part.write_text(text, encoding="utf-8")


def selected(tables: Sequence[Table], planned: Plan, only: Sequence[str]) -> list[Run]:
    """The runs of the experiments or tables of these names, of all if there are none.

    First seeds come first, so that a page of every row is there as early as can be.

    Raises:
      ValueError: a name that is neither.
    """
    by_table = {table.name: [e.name for e in table.experiments] for table in tables}
    known = [name for names in by_table.values() for name in names]
    for name in only:
        if name not in by_table and name not in known:
            raise ValueError(
                f"--only {name}: give of {', '.join(dict.fromkeys([*by_table, *known]))}"
            )
    names = {one for name in only for one in by_table.get(name, [name])} or set(known)
    every = [run for name, runs in planned.runs.items() if name in names for run in runs]
    return sorted(every, key=lambda run: planned.seeds.index(run.seed))


def command(args: argparse.Namespace) -> list[str]:
    """The words that write the same page again."""
    words = ["python", "-m", "benchmarks.results"]
    words += ["--output", os.fspath(args.output), "--workdir", os.fspath(args.workdir)]
    words += ["--seeds", ",".join(map(str, args.seeds)), "--budget", f"{args.budget:g}"]
    return words + (["--limit", str(args.limit)] if args.limit else [])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
