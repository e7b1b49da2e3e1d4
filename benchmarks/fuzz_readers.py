"""Reads damaged and hostile files by every reader, and counts how that ends.

    python -m benchmarks.fuzz_readers --count 100000 --output fuzz     # again: goes on from there

Each case is a small valid file (weights, configs, tokenizers, LoRAs, prompts, recipes, arrays,
scorers: `benchmarks/fuzz/targets.py`) with random changes. It must be read, or refused by a
ValueError or OSError of one line, within 20 s, without growing beyond twice the input and 200 MB,
and without a file written elsewhere. Case number n of a seed is always the same. What ends
otherwise is kept in `OUTPUT/failures`, the counts in `OUTPUT/summary.json`. Exit 1 if there is any.
"""

import argparse
import collections
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.fuzz import data_targets, model_targets
from benchmarks.fuzz.mutations import changed
from benchmarks.fuzz.targets import Target
from benchmarks.fuzz.watch import Guard, run


def targets(folder: Path) -> list[Target]:
    """Writes the valid files and returns their readers."""
    kinds = (
        model_targets.models, model_targets.tokenizers, model_targets.loras,
        data_targets.texts, data_targets.scorers, data_targets.arrays,
    )  # fmt: skip
    return [target for kind in kinds for target in kind(folder)]


def case(
    number: int, seed: int, readers: list[Target], guard: Guard, folder: Path
) -> tuple[Target, bytes, object]:
    """Makes and reads one damaged file.

    Returns:
      The target, the file's bytes, and how it ended, a `watch.Outcome`.
    """
    rng = random.Random(f"{seed}/{number}")
    target = rng.choices(readers, [reader.weight for reader in readers])[0]
    valid = target.file.read_bytes()
    data = changed(target.kind, rng, valid)
    target.file.write_bytes(data)
    try:
        return target, data, run(lambda: target.read(rng), len(data), guard, folder)
    finally:
        if target.file.is_dir() or not target.file.parent.is_dir():
            raise RuntimeError(f"{target.file} is no file any more")
        target.file.write_bytes(valid)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="targets whose names hold this text")
    parser.add_argument("--case", type=int, help="one case alone, with all it says")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.WARNING)
    jax.config.update("jax_enable_compilation_cache", False)  # it is written elsewhere
    # A safety net: a reader that asks for more ends itself, not the machine.
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, resource.RLIM_INFINITY))
    failures = options.output / "failures"
    failures.mkdir(parents=True, exist_ok=True)
    summary = options.output / "summary.json"
    state = {"seed": options.seed, "done": 0, "seconds": 0.0, "outcomes": {}, "targets": {}}
    if summary.is_file() and options.case is None:
        state = json.loads(summary.read_text())
    outcomes = collections.Counter(state["outcomes"])
    by_target = collections.defaultdict(collections.Counter)
    for name, counts in state["targets"].items():
        by_target[name].update(counts)
    guard = Guard()
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        readers = [reader for reader in targets(folder) if options.only in reader.name]
        for reader in readers:  # the valid files are read
            outcome = run(lambda r=reader: r.read(random.Random(0)), 10**9, guard, folder)
            if outcome.kind != "ok":
                sys.exit(f"the valid file of {reader.name} is not read: {outcome}")
        if options.case is not None:
            target, data, outcome = case(options.case, state["seed"], readers, guard, folder)
            print(target.name, len(data), outcome.kind, outcome.text, sep="\n")
            return 0 if outcome.good else 1
        began, before = time.monotonic(), state["seconds"]
        for number in range(state["done"], options.count):
            target, data, outcome = case(number, state["seed"], readers, guard, folder)
            outcomes[outcome.kind] += 1
            by_target[target.name][outcome.kind] += 1
            if not outcome.good:
                name = f"{number}-{outcome.kind}-{target.name.replace(' ', '_')}"
                (failures / name).write_bytes(data)
                (failures / f"{name}.txt").write_text(outcome.text)
            if (number + 1) % 500 == 0 or number + 1 == options.count:
                state |= {
                    "done": number + 1, "seconds": before + time.monotonic() - began,
                    "outcomes": dict(outcomes),
                    "targets": {k: dict(v) for k, v in sorted(by_target.items())},
                }  # fmt: skip
                part = summary.with_suffix(".part")
                part.write_text(json.dumps(state, indent=1) + "\n")
                part.replace(summary)
    print(json.dumps({k: state[k] for k in ("seed", "done", "seconds", "outcomes")}))
    return 1 if set(outcomes) - {"ok", "refused"} else 0


if __name__ == "__main__":
    sys.exit(main())
