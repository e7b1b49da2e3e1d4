"""Which package may import which: values move down, and no layer knows the one above it."""

import ast

import pytest

from tlcm_jax import paths

# What each may import besides itself; the others say what they must not.
ONLY = {"diffusion": set(), "models": set(), "training": {"io"}, "data": {"io"}}
NEVER = {
    "io": {"config", "distillation", "evaluation", "generation", "training"},
    "families": {"config", "distillation", "evaluation", "generation", "training"},
    "distillation": {"config", "generation", "training"},
    "generation": {"config", "distillation", "evaluation"},
    "evaluation": {"config", "distillation", "training"},
    "planning": {"evaluation", "generation", "io"},
    "config": {"planning"},
}
# Of the repository, what a library cannot count on.
OUTSIDE = {"benchmarks", "configs", "miniature", "tests"}


def imported(package=""):
    """Top names that the modules of a package import, and those of `tlcm_jax` below it."""
    tops, inside = set(), set()
    for file in (paths.ROOT / "tlcm_jax" / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top, *rest = name.split(".")
                tops.add(top)
                if top == "tlcm_jax" and rest:
                    inside.add(rest[0])
    return tops, inside


def test_the_library_imports_nothing_of_the_repository_around_it():
    assert not imported()[0] & OUTSIDE


@pytest.mark.parametrize("package", ONLY)
def test_what_stands_alone_imports_itself(package):
    assert imported(package)[1] <= ONLY[package] | {package}


@pytest.mark.parametrize("package", NEVER)
def test_no_package_imports_the_one_above_it(package):
    assert not imported(package)[1] & NEVER[package]
