"""Figures in the prose of the page are those of its tables, and what it claims of them holds."""

import re

import pytest

from benchmarks.results import prose
from tlcm_jax import paths

PAGE = paths.ROOT / "docs" / "results.md"
COMMENTARY = paths.ROOT / "docs" / "results" / "commentary.md"
HAS_PROSE = pytest.mark.skipif(not COMMENTARY.is_file(), reason="no commentary is written yet")
LINES = """
## Rows

|  | all checks, % | places, TV | forwards, k |
| --- | ---: | ---: | ---: |
| `ours` a row (1 of 3 seeds) | 50.3 ± 0.9 | 72.7 | 42.4 |
| teacher, 25 steps with guidance | 49.5 ± 0.9 | 76.5 ± 0.7 | – |
| undistilled, in the student's sampler, 4 steps | 49.2 | – | – |
| real pictures | 96.2 | 25.0 | – |

### Rows: places, TV

| steps | 4 | 8 | 25 |
| --- | ---: | ---: | ---: |
| `ours` | 72.7 | 70.9 ± 0.4 | – |
| teacher with guidance | 130.2 | – | 76.5 ± 0.7 |
| undistilled, in the student's sampler | 82.8 | – | – |
""".split("\n")


def test_every_cell_has_a_name():
    assert prose.figures(LINES) == {
        "ours.checks.4": "50.3", "ours.places.4": "72.7", "ours.forwards": "42.4",
        "teacher.checks.25": "49.5", "teacher.places.25": "76.5", "undistilled.checks.4": "49.2",
        "real.checks": "96.2", "real.places": "25.0", "ours.places.8": "70.9",
        "teacher.places.4": "130.2", "undistilled.places.4": "82.8",
    }  # fmt: skip


def test_tables_that_disagree_are_refused():
    changed = [line.replace("| `ours` | 72.7", "| `ours` | 71.0") for line in LINES]
    with pytest.raises(ValueError, match="ours.places.4 is 72.7 in one table and 71.0 in another"):
        prose.figures(changed)


@pytest.mark.parametrize(
    ("text", "figure"),
    [
        ("{ours.places.8} of it", "70.9 of it"),
        ("by {teacher.places.25 - ours.places.4}", "by 3.8"),
        ("{teacher.places.4 / ours.places.4} times", "1.8 times"),
        ("{assert ours.places.8 < ours.places.4 < teacher.places.25}said", "said"),
    ],
)
def test_names_become_figures(text, figure):
    assert prose.resolve(text, prose.figures(LINES)) == figure


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ours.places.3}", "names 'ours.places.3', which no table"),
        ("{ours.places.4 - other.places.4}", "names 'other.places.4'"),
        ("{assert ours.places.4 < ours.places.8}", r"claims ours.places.4 < ours.places.8"),
        ("{assert ours.places.4 < ours.places.4}", r"which is \[72.7, 72.7\]"),
    ],
)
def test_what_no_table_backs_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        prose.resolve(text, prose.figures(LINES))


@HAS_PROSE
def test_the_page_s_prose_is_the_commentary_with_the_page_s_figures():
    page = PAGE.read_text(encoding="utf-8")
    commentary = COMMENTARY.read_text(encoding="utf-8")
    known = prose.figures(page.split("\n"))
    assert prose.resolve(commentary, known).strip() in page
    # A mean that changes in the tables changes the prose, or is refused.
    for name in re.findall(r"[{ ]((?:\w+\.)+\w+)\}", commentary)[:10]:
        changed = {**known, name: "0.1"}
        try:
            assert prose.resolve(commentary, changed).strip() not in page
        except ValueError:
            pass


@HAS_PROSE
def test_no_figure_is_typed_into_the_commentary():
    typed = re.sub(r"\{[^{}]*\}|`[^`]*`", "", COMMENTARY.read_text(encoding="utf-8"))
    assert not re.search(r"\d+\.\d|\d\s*%|±", typed)
