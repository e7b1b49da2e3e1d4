"""Which small mistakes the tests find: mutants of the wiring, each run against its own tests.

    python -m benchmarks.mutants --count 80 --output mutants.md            # a random sample
    python -m benchmarks.mutants --packages training --only loop.py:190    # the mutants of a line

A mutant is one module with one thing changed: a comparison (< for <=), an operator (+ for -), a
constant (one more, twice as much), a condition turned round, a keyword argument left out, nothing
returned. It is written into a copy of the repository, and the tests that name the module run there
until one fails; a mutant whose tests all pass has survived. One that runs out of time counts as
found, since a test that hangs is seen. The sample is a function of the seed and of the code.

Left alone: docstrings, annotations, imports, how dataclasses are declared, what is logged, and the
text of messages.
"""

import argparse
import ast
import copy
import dataclasses
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("config", "training", "generation", "evaluation", "io")
COPIED = ("tlcm_jax", "tests", "miniature", "configs", "benchmarks", "launch", "docs")

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}  # fmt: skip
# Calls whose arguments are words for people.
_TOLD = ("logging", "warnings", "print", "exit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one module.

    Attributes:
      path: of the module, from the root.
      line: where.
      says: what was changed.
      node: which node of `ast.walk`'s order is changed, and `change` in which of its ways.
      change: see there.
    """

    path: Path
    line: int
    says: str
    node: int
    change: int

    def source(self, root: Path) -> str:
        """The changed module."""
        tree = ast.parse((root / self.path).read_text(encoding="utf-8"))
        node = list(ast.walk(tree))[self.node]
        _, apply = list(_changes(node))[self.change]
        apply(node)
        return ast.unparse(ast.fix_missing_locations(tree))


def mutants(path: Path, root: Path = ROOT) -> list[Mutant]:
    """All mutants of a module."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    silent = {id(node) for node in _left_alone(tree)}
    return [
        Mutant(path=path, line=node.lineno, says=says, node=i, change=j)
        for i, node in enumerate(ast.walk(tree))
        if id(node) not in silent
        for j, (says, _) in enumerate(_changes(node))
    ]


def _left_alone(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        below: list[ast.AST | None] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(_TOLD):
            below = [node]
        elif isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            below = [node]
        elif isinstance(node, ast.AnnAssign | ast.arg):
            below = [node.annotation]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            below = [node.returns]
        elif isinstance(node, ast.ClassDef):
            below = list(node.decorator_list)
        for each in below:
            yield from ast.walk(each) if each is not None else ()


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """What can be changed of a node: in words, and as a function that does it."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new = COMPARISONS[type(node.ops[0])]
        yield _became(node, lambda n: n.ops.__setitem__(0, new()))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        other = OPERATORS[type(node.op)]
        yield _became(node, lambda n: setattr(n, "op", other()))
    elif isinstance(node, ast.BoolOp):
        joined = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield _became(node, lambda n: setattr(n, "op", joined()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        # `not not x`: the node itself cannot take its operand's place.
        yield _became(node, lambda n: setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        values = (
            [not value] if isinstance(value, bool) else [value + 1, *([2 * value] * bool(value))]
        )
        for value in values:
            yield _became(node, lambda n, value=value: setattr(n, "value", value))
    elif isinstance(node, ast.IfExp | ast.If | ast.While):
        negated = lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))  # noqa: E731
        yield f"condition `{_short(node.test)}` turned round", negated
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield (
                    f"`{keyword.arg}=` left out of `{_short(node.func)}(..)`",
                    lambda n, i=i: n.keywords.pop(i),
                )
    elif isinstance(node, ast.Return) and node.value is not None:
        says = f"`return {_short(node.value)}` returns None"
        yield says, lambda n: setattr(n, "value", ast.Constant(None))


def _became(node: ast.AST, apply: Callable) -> tuple[str, Callable]:
    changed = copy.deepcopy(node)
    apply(changed)
    return f"`{_short(node)}` became `{_short(changed)}`", apply


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split()).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 60 else text[:57] + "..."


def tests_of(path: Path, root: Path = ROOT) -> list[Path]:
    """The test files that name a module: the one that mirrors it, then the others by size."""
    dotted = ".".join(path.with_suffix("").parts)
    package, _, name = dotted.rpartition(".")
    named = re.compile(rf"{re.escape(dotted)}\b|from {re.escape(package)} import [^\n]*\b{name}\b")
    mirror = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    found = {
        file.relative_to(root): len(text)
        for file in (root / "tests").rglob("test_*.py")
        if named.search(text := file.read_text(encoding="utf-8"))
    }
    if (root / mirror).is_file():
        found[mirror] = 0
    return sorted(found, key=lambda file: (found[file], file))


def run_tests(root: Path, tests: Sequence[Path], seconds: float) -> str:
    """Runs tests until one fails: "passed", "out of time", or the one that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    try:
        ended = subprocess.run(
            [*command, *map(str, tests)],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return "out of time"
    if ended.returncode == 0:
        return "passed"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.M)
    return failed.group(1) if failed else "no test ran"


def copy_repository(folder: Path) -> Path:
    """The repository's code and tests in a folder of their own."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    return folder


def main() -> None:
    """Makes a sample, runs it, and prints each mutant with what found it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", default=",".join(PACKAGES), help="of tlcm_jax, with commas")
    parser.add_argument("--only", default="", help="MODULE.py or MODULE.py:LINE: no sample")
    parser.add_argument("--count", type=int, default=80, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=600, help="that a mutant's tests may take")
    parser.add_argument("--files", type=int, default=0, help="test files a mutant; 0 takes all")
    parser.add_argument("--output", type=Path, help="where a table goes, as Markdown")
    args = parser.parse_args()
    every = [
        mutant
        for package in args.packages.split(",")
        for path in sorted((ROOT / "tlcm_jax" / package).rglob("*.py"))
        for mutant in mutants(path.relative_to(ROOT))
    ]
    if args.only:
        name, _, line = args.only.partition(":")
        chosen = [m for m in every if m.path.name == name and (not line or m.line == int(line))]
    else:
        chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))
    print(f"{len(chosen)} of {len(every)} mutants", flush=True)
    rows: list[tuple[Mutant, str]] = []
    sound: dict[tuple[Path, ...], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = copy_repository(Path(folder))
        for i, mutant in enumerate(chosen, start=1):
            tests = tests_of(mutant.path)
            tests = tuple(tests[: args.files] if args.files else tests)
            found = "no test names the module"
            if tests:
                if tests not in sound:
                    sound[tests] = run_tests(root, tests, args.seconds)
                if sound[tests] != "passed":
                    sys.exit(f"without a mutant, {mutant.path}'s tests: {sound[tests]}")
                (root / mutant.path).write_text(mutant.source(ROOT), encoding="utf-8")
                found = run_tests(root, tests, args.seconds)
                shutil.copy(ROOT / mutant.path, root / mutant.path)
            rows.append((mutant, found))
            verdict = "SURVIVED" if survived(found) else "found"
            print(f"[{i}/{len(chosen)}] {verdict} {mutant.path}:{mutant.line} {mutant.says} "
                  f"({found})", flush=True)  # fmt: skip
            if args.output:
                args.output.write_text(table(rows), encoding="utf-8")
    count = sum(not survived(found) for _, found in rows)
    print(f"{count} of {len(rows)} found, {100 * count / max(1, len(rows)):.0f} %")


def survived(found: str) -> bool:
    """Whether no test saw a mutant; a run that was killed has seen nothing."""
    return found in ("passed", "no test names the module", "no test ran")


def table(rows: Sequence[tuple[Mutant, str]]) -> str:
    """The mutants and what became of them, as a Markdown table."""
    lines = ["| where | mutant | found by |", "| --- | --- | --- |"]
    for mutant, found in rows:
        by = "**survived**" if survived(found) else found.rpartition("::")[2] or found
        lines.append(f"| `{mutant.path}:{mutant.line}` | {mutant.says} | {by} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
