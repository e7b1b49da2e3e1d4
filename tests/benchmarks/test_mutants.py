"""Mutants: what is changed of a module, what is left alone, and which tests are asked."""

import ast
import itertools
from pathlib import Path

from benchmarks import mutants

MODULE = '''"""A docstring with 3 numbers."""
import dataclasses
import logging


@dataclasses.dataclass(frozen=True)
class Box:
    """Left alone."""


def clamp(x: int, low: int = 0) -> int:
    """Another, 4."""
    if not x >= low:
        logging.info("too low: %d", 5)
        raise ValueError(f"{x + 1} is below")
    return max(low, x + 2, key=abs)
'''


def made(tmp_path):
    path = Path("clamp.py")
    (tmp_path / path).write_text(MODULE)
    return {m.says: m.source(tmp_path) for m in mutants.mutants(path, tmp_path)}


def test_each_mutant_is_one_change_of_the_program(tmp_path):
    found = made(tmp_path)
    assert set(found) == {
        "condition `not x >= low` turned round",
        "`not x >= low` became `not not x >= low`",
        "`x >= low` became `x > low`",
        "`0` became `1`",
        "`x + 2` became `x - 2`",
        "`2` became `3`",
        "`2` became `4`",
        "`key=` left out of `max(..)`",
        "`return max(low, x + 2, key=abs)` returns None",
    }
    whole = ast.unparse(ast.parse(MODULE))
    for source in found.values():
        differing = [a != b for a, b in zip(source.split("\n"), whole.split("\n"), strict=True)]
        assert sum(differing) == 1


def test_comparisons_operators_and_constants_each_have_another():
    for old, new in itertools.chain(mutants.COMPARISONS.items(), mutants.OPERATORS.items()):
        assert old is not new


def test_the_tests_of_a_module_are_those_that_name_it_its_mirror_first():
    found = mutants.tests_of(Path("tlcm_jax/training/loop.py"))
    assert found[0] == Path("tests/training/test_loop.py")
    assert Path("tests/training/test_checkpoints.py") not in found
    assert mutants.tests_of(Path("tlcm_jax/config/schema.py"))[0].name == "test_schema.py"


def test_what_survived_stands_out(tmp_path):
    (tmp_path / "a.py").write_text("x = 1 < 2\n")
    first, *_ = mutants.mutants(Path("a.py"), tmp_path)
    lines = mutants.table([(first, "passed"), (first, "tests/test_a.py::test_it")]).splitlines()
    assert lines[2].endswith("| **survived** |") and lines[3].endswith("| test_it |")
    assert mutants.survived("no test names the module") and not mutants.survived("out of time")
