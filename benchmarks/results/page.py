"""The page: tables of what the runs' folders hold. No figure in it is typed by hand.

Not in the prose either, which a person writes: its figures are names (`prose.py`).
"""

import dataclasses
import functools
import math
import operator
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import prose
from benchmarks.results.experiment import Table
from benchmarks.results.measure import UNSEEN
from benchmarks.results.numbers import (
    NOTHING,
    difference,
    minutes,
    number,
    table,
    thousands,
)
from benchmarks.results.runs import Plan, Run
from tlcm_jax.evaluation.reporting.provenance import duration
from tlcm_jax.evaluation.scorers.base import Measure

COMMENTARY = "commentary.md"
MEASURES = (
    Measure(key="all_checks", title="all checks, %", percent=True),
    Measure(key=UNSEEN, title="unseen pairs, %", percent=True),
    Measure(key="malformed", title="malformed, %", percent=True, higher_is_better=False),
    Measure(key="open_attributes", title="open attributes, TV", higher_is_better=False),
    Measure(key="places", title="places, TV", higher_is_better=False),
    Measure(key="frechet", title="Fréchet", higher_is_better=False),
    Measure(key="precision", title="precision, %", percent=True),
    Measure(key="recall", title="recall, %", percent=True),
    Measure(key="contrastive", title="scorer"),
)
# All checks over the prompts of one task; the world's rungs have some or all of them.
TASKS = tuple(
    Measure(key=name.replace(" ", "_"), title=f"{name}, %", percent=True)
    for name in (
        "single object",
        "colours",
        "size",
        "two objects",
        "colour attribution",
        "position",
        "counting",
        "fill",
        "style",
    )
)
_TEACHER_STEPS = 25

Scores = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What the folders hold.

    Attributes:
      teachers: the teacher's scores, one a seed.
      runs: those of the runs that have ended well, by experiment.
      failed: why others have not, by `Run.label`.
    """

    teachers: Sequence[Scores]
    runs: Mapping[str, Sequence[Scores]]
    failed: Mapping[str, str]


def collect(plan: Plan) -> Found:
    """Reads the folders of a plan.

    Raises:
      FileNotFoundError: the teacher has not been scored under any seed.
    """
    teachers = [scores for run in plan.teachers.values() if (scores := run.scores()) is not None]
    if not teachers:
        folders = ", ".join(str(run.folder) for run in plan.teachers.values())
        raise FileNotFoundError(
            f"no scores of the teacher in {folders}: run without --rewrite first"
        )
    every: list[Run] = [run for runs in plan.runs.values() for run in runs]
    return Found(
        teachers=teachers,
        runs={
            name: [scores for run in runs if (scores := run.scores()) is not None]
            for name, runs in plan.runs.items()
        },
        failed={run.label: message for run in every if (message := run.failure())},
    )


def compared(tables: Sequence[Table], found: Found) -> list[Table]:
    """The tables of which two rows have run: one row alone compares nothing."""
    return [
        one
        for one in tables
        if sum(bool(found.runs.get(experiment.name)) for experiment in one.experiments) > 1
    ]


def page(
    tables: Sequence[Table],
    plan: Plan,
    found: Found,
    *,
    command: Sequence[str],
    commentary: str = "",
    sheets: Mapping[str, Mapping[int, str]] | None = None,
) -> str:
    """The whole page in Markdown.

    Args:
      tables: in order, those that are `compared`.
      plan: what was to be run.
      found: what was.
      command: the words that write the page again.
      commentary: Markdown by a person, whose figures are names (`prose.py`).
      sheets: link of a contact sheet, by table and steps.
    """
    sections: list[str] = []
    for one in tables:
        sections += ["", *_section(one, plan, found, (sheets or {}).get(one.name, {}))]
    lines = ["# Results", "", *_method(plan, found, command)]
    if commentary.strip():
        lines += ["", prose.resolve(commentary, prose.figures(sections)).strip()]
    return "\n".join([*lines, *sections]) + "\n"


def _method(plan: Plan, found: Found, command: Sequence[str]) -> Iterator[str]:
    teacher = found.teachers[0]
    where = teacher["provenance"]
    count = len(plan.seeds)
    done = [scores for every in found.runs.values() for scores in every]
    spent = sum(scores["training_seconds"] + sum(scores["seconds"].values()) for scores in done)
    seeds = ", ".join(map(str, plan.seeds))
    spread = (
        f"Numbers are mean ± standard deviation over {count} seeds ({seeds}), of the training and "
        "of the noise that pictures are drawn from"
        if count > 1
        else f"One seed ({seeds}), so no spread is known"
    )
    prompts = teacher["prompts"]
    yield "Written by"
    yield from ("", "```shell", shlex.join(command), "```", "")
    yield (
        f"Every run uses {plan.evaluations:,.0f} UNet forwards: the teacher's, the target's, the "
        "rollout's, the student's and the critics' together. Beside it stand the student's "
        f"backward passes, one for each pair it learns from. {spread}; a row says how many "
        "where it has fewer. All rows of a seed, the teacher's too, draw from the same noise."
    )
    yield ""
    yield (
        f"Judged by the world's parser on {prompts} held-out prompts, at 4 steps where a table "
        f"does not say; a share of so many has a sampling error of up to "
        f"{50 / math.sqrt(prompts):.1f} points. All checks: the picture is well formed and all "
        f"that its prompt names is there. Unseen pairs: the same on {teacher['unseen']} prompts of "
        "shapes in colours that the teacher never saw. TV: total-variation distance of what "
        "prompts leave open from its known distribution, lower is better; that of real renders, "
        "which are as many, is the floor. A student begins as the undistilled teacher in the "
        "student's sampler, so that row is what training starts from."
    )
    yield ""
    yield (
        f"{len(done)} runs, {duration(spent)} of work in all, on {where['host']}, "
        f"{where['devices']}; {where['versions']}."
    )


def _section(one: Table, plan: Plan, found: Found, sheets: Mapping[int, str]) -> Iterator[str]:
    yield from (f"## {one.title}", "", one.says, "")
    steps = 4 if 4 in one.steps else one.steps[0]
    yield from _at(one, plan, found, steps)
    if tasks := _known(one, found, TASKS):
        yield from ("", f"### {one.title}: by task, {steps} steps", "")
        yield from _at(one, plan, found, steps, tasks)
    if len(one.steps) > 1:
        for measure in _known(one, found):
            if measure.key == UNSEEN:  # drawn in 4 steps alone
                continue
            if one.followed and measure.key not in one.followed:
                continue
            yield from ("", f"### {one.title}: {measure.title}", "")
            yield from _by_steps(one, found, measure)
    if len(found.runs.get(one.against, ())) > 1:
        yield from ("", f"### {one.title}: each row less `{one.against}`", "")
        yield (
            "All checks, points by seed and their standard error; bold where it is more than two "
            "of them."
        )
        yield from ("", *_less(one, found, MEASURES[0]))
    for count, link in sorted(sheets.items()):
        label = f"{count} step{'s' if count > 1 else ''}"
        yield from ("", f"![The same prompts and noise by every row, {label}]({link})")
    yield from _remarks(one, plan, found)


def _at(
    one: Table, plan: Plan, found: Found, steps: int, tasks: Sequence[Measure] = ()
) -> list[str]:
    """Every measure at one number of steps, and what it cost; or the tasks' alone."""
    measures = tasks or _known(one, found)
    costs = [] if tasks else ["forwards, k", "backwards, k", "training, min"]
    header = ["", *[m.title for m in measures], *costs]
    rows = []
    for experiment in one.experiments:
        runs = found.runs.get(experiment.name)
        if not runs:
            continue
        fewer = f" ({len(runs)} of {len(plan.seeds)} seeds)" if len(runs) < len(plan.seeds) else ""
        says = "" if tasks else f" {experiment.says}{fewer}"
        spent = [
            thousands([run["forwards"] for run in runs]),
            thousands([run["backwards"] for run in runs]),
            minutes([run["training_seconds"] for run in runs]),
        ]
        cells = _cells(measures, _all(runs, "student", steps))
        rows.append([f"`{experiment.name}`{says}", *cells, *spent[: len(costs)]])
    others = [
        (f"teacher, {count} steps with guidance", _all(found.teachers, "teacher", count))
        for count in (_TEACHER_STEPS, 4)
    ]
    undistilled = f"undistilled, in the student's sampler, {steps} steps"
    others.append((undistilled, _all(found.teachers, "student", steps)))
    if not tasks:
        others.append(("real pictures", [found.teachers[0]["real"]]))
    rows += [
        [name, *_cells(measures, scores), *[NOTHING] * len(costs)]
        for name, scores in others
        if any(scores)
    ]
    return table(header, rows)


def _by_steps(one: Table, found: Found, measure: Measure) -> list[str]:
    """One measure at every number of steps."""
    counts = (*one.steps, _TEACHER_STEPS)
    header = ["steps", *map(str, counts)]

    def row(name: str, runs: Sequence[Scores], kind: str) -> list[str]:
        found = [[one.get(measure.key) for one in _all(runs, kind, count)] for count in counts]
        return [name, *[number(values, measure) for values in found]]

    rows = [
        row(f"`{experiment.name}`", found.runs[experiment.name], "student")
        for experiment in one.experiments
        if found.runs.get(experiment.name)
    ]
    rows.append(row("teacher with guidance", found.teachers, "teacher"))
    rows.append(row("undistilled, in the student's sampler", found.teachers, "student"))
    return table(header, rows)


def _less(one: Table, found: Found, measure: Measure) -> list[str]:
    """How each row differs from the one that they are held against, at every number of steps."""
    theirs = {run["seed"]: run for run in found.runs[one.against]}
    rows = []
    for experiment in one.experiments:
        runs = [run for run in found.runs.get(experiment.name, ()) if run["seed"] in theirs]
        if not runs or experiment.name == one.against:
            continue
        cells = []
        for steps in one.steps:
            ours = _all(runs, "student", steps)
            others = _all([theirs[run["seed"]] for run in runs], "student", steps)
            both = zip(ours, others, strict=True)
            known = [
                (a[measure.key], b[measure.key])
                for a, b in both
                if {measure.key} <= a.keys() & b.keys()
            ]
            cells.append(difference([a - b for a, b in known], measure))
        rows.append([f"`{experiment.name}`", *cells])
    return table(["steps", *map(str, one.steps)], rows)


def _remarks(one: Table, plan: Plan, found: Found) -> Iterator[str]:
    """Which rows are missing, and why."""
    names = {experiment.name for experiment in one.experiments}
    failed = {label: why for label, why in found.failed.items() if label.partition(",")[0] in names}
    waiting = {name: why for name, why in plan.waiting.items() if name in names}
    ran = {name for name in names if found.runs.get(name)}
    stopped = {label.partition(",")[0] for label in failed}
    rest = [
        experiment.name
        for experiment in one.experiments
        if experiment.name not in ran | stopped | set(waiting) | set(plan.absent)
    ]
    if failed or waiting or rest:
        yield ""
    yield from (f"- `{label}` failed: {why}" for label, why in failed.items())
    yield from (f"- `{name}` was not run: {why}." for name, why in waiting.items())
    if rest:
        yield "- Not run: " + ", ".join(f"`{name}`" for name in rest) + "."


def _known(one: Table, found: Found, measures: Sequence[Measure] = MEASURES) -> list[Measure]:
    """The measures that some row of a table has."""
    runs = [run for each in one.experiments for run in found.runs.get(each.name, ())]
    scores = (each for run in runs for each in run["scores"]["student"].values())
    keys = functools.reduce(operator.or_, map(set, scores), set())
    return [measure for measure in measures if measure.key in keys]


def _cells(measures: Sequence[Measure], scores: Sequence[Mapping[str, float]]) -> list[str]:
    return [number([one.get(m.key) for one in scores], m) for m in measures]


def _all(runs: Sequence[Scores], kind: str, steps: int) -> list[Mapping[str, float]]:
    """The scores of several seeds by one kind of sampler; an empty one where it did not draw."""
    return [run["scores"].get(kind, {}).get(str(steps), {}) for run in runs]


def commentary_beside(output: Path) -> str:
    """The text that a person has put beside the page, or ""."""
    path = output.with_suffix("") / COMMENTARY
    return path.read_text(encoding="utf-8") if path.is_file() else ""
