"""Prose whose figures come from the tables of its own page, by name.

In braces stands what is looked up, and nothing else in the prose is a figure:

    {default.checks.4}                     the mean of a row's measure at 4 steps
    {dmd2.forwards}                        of a measure that has no steps
    {default.checks.4 - paper.checks.4}    a difference, or with / a ratio
    {assert undistilled.checks.4 < lcm.checks.4 < default.checks.4}
                                           nothing, if it holds: what the words beside it claim

Rows go by their experiments' names, and `teacher`, `undistilled` and `real`.
"""

import itertools
import re
from collections.abc import Iterable, Mapping

# Titles of measures -> their names in prose.
MEASURES = {
    "all checks, %": "checks",
    "unseen pairs, %": "unseen",
    "malformed, %": "malformed",
    "open attributes, TV": "open",
    "places, TV": "places",
    "Fréchet": "frechet",
    "precision, %": "precision",
    "recall, %": "recall",
    "scorer": "scorer",
    "single object, %": "single",
    "colours, %": "colours",
    "size, %": "size",
    "two objects, %": "two",
    "colour attribution, %": "attribution",
    "position, %": "position",
    "counting, %": "counting",
    "fill, %": "fill",
    "style, %": "style",
}
WITHOUT_STEPS = {"forwards, k": "forwards", "backwards, k": "backwards", "training, min": "minutes"}
_OTHERS = {"teacher": "teacher", "undistilled": "undistilled", "real pictures": "real"}
_REFERENCE = re.compile(r"\{([^{}]*)\}")

Figures = Mapping[str, str]


def figures(lines: Iterable[str]) -> dict[str, str]:
    """Every mean in a page's tables, as text, by `row.measure.steps`.

    Raises:
      ValueError: two tables say different things of one name.
    """
    found: dict[str, str] = {}
    for heading, table in _tables(lines):
        if ": each row less " in heading:
            continue
        header, rows = table[0], table[2:]
        # A table of one measure has its name in the heading, one of one step count says which.
        measure = MEASURES.get(heading.rpartition(": ")[2], "")
        counts = [m[1] for row in rows if (m := re.search(r"undistilled.*, (\d+) step", row[0]))]
        for row in rows:
            name = _row(row[0])
            own = re.match(r"teacher, (\d+) steps", row[0])
            steps = own[1] if own else counts[0] if counts else ""
            for title, cell in zip(header[1:], row[1:], strict=True):
                if measure:
                    key = f"{name}.{measure}.{title}"
                elif title in WITHOUT_STEPS:
                    key = f"{name}.{WITHOUT_STEPS[title]}"
                else:
                    key = f"{name}.{MEASURES[title]}" + ("" if name == "real" else f".{steps}")
                mean = cell.partition(" ±")[0]
                if mean != "–" and found.setdefault(key, mean) != mean:
                    raise ValueError(f"{key} is {found[key]} in one table and {mean} in another")
    return found


def resolve(prose: str, known: Figures) -> str:
    """Prose with its references replaced by figures.

    Raises:
      ValueError: an unknown name, or an assertion that does not hold.
    """
    resolved = _REFERENCE.sub(lambda match: _figure(match[1], known), prose)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in resolved.split("\n")))


def _figure(reference: str, known: Figures) -> str:
    if reference.startswith("assert "):
        values = [float(_value(one, known)) for one in reference[len("assert ") :].split("<")]
        if not all(low < high for low, high in itertools.pairwise(values)):
            raise ValueError(f"the prose claims {reference[7:]}, which is {values}")
        return ""
    return _value(reference, known)


def _value(expression: str, known: Figures) -> str:
    names = re.split(r" ([-/]) ", expression.strip())
    for name in names[::2]:
        if name not in known:
            raise ValueError(f"the prose names {name!r}, which no table of the page has")
    if len(names) == 1:
        return known[names[0]]
    left, operator, right = names
    a, b = float(known[left]), float(known[right])
    digits = len(known[left].partition(".")[2]) if operator == "-" else 1
    return f"{a - b if operator == '-' else a / b:.{digits}f}"


def _row(label: str) -> str:
    if match := re.match(r"`(\w+)`", label):
        return match[1]
    return next(name for start, name in _OTHERS.items() if label.startswith(start))


def _tables(lines: Iterable[str]) -> Iterable[tuple[str, list[list[str]]]]:
    """The tables of a page with the heading that each stands under: cells by row."""
    heading, table = "", []
    for line in itertools.chain(lines, [""]):
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if table:
            yield heading, table
            table = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
