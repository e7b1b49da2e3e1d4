"""A recipe's plan on several topologies, as a table: README's.

    python -m benchmarks.topologies --model sdxl-configs --write README.md

Everything in it is modelled (docs/scale.md), and nothing of it is typed by hand: `--write` puts the
table between the file's two marks. `--model` needs the model's configs alone. With `--price
v5e=1.2,h100=3`, of a chip-hour, it has the costs. Needs `pip install -e '.[plan]'`, and minutes for
each kind of TPU that `--store` does not know yet.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKS = ("<!-- topologies -->", "<!-- /topologies -->")
TOPOLOGIES = (
    *("v5e:4x4", "v6e:4x4", "v5p:2x2x4", "v4:2x2x4", "tpu7x:2x2x2"),
    *("h100:16", "h200:16"),
)


def row(name: str, plans: Sequence[Any], where: Any, prices: Mapping[str, float]) -> list[str]:
    """A topology's cells."""
    from tlcm_jax.planning import report
    from tlcm_jax.planning.topologies import GIB

    device = where.device
    fullest = max(plans, key=lambda plan: plan.peak)
    seconds = sum(plan.steps * plan.step_seconds for plan in plans)
    flops = sum(plan.steps * plan.flops for plan in plans)
    pairs = sum(plan.steps * plan.pairs for plan in plans)
    hours = seconds / 3600 * where.chips
    steps = sum(plan.steps for plan in plans)
    cells = [
        f"`{name}`",
        str(plans[0].batch),
        f"{fullest.peak / GIB:.1f} of {device.memory / GIB:.0f}",
        "yes" if report.fits(fullest, where) else report.advice(fullest, where, "blocks"),
        f"{1e3 * seconds / steps:.0f}",
        f"{100 * flops / seconds / device.peak:.0f} %",
        f"{pairs / seconds:.0f}",
        f"{hours:.1f}",
    ]
    if prices:
        price = prices.get(device.name)
        cells.append("" if price is None else f"{price * hours:.0f}")
    return cells


def table(rows: Sequence[Sequence[str]], prices: Mapping[str, float]) -> str:
    """Markdown."""
    heads = ["topology", "pairs a device", "GiB a device", "fits", "step, ms", "MFU", "pairs/s"]
    heads += ["chip-hours", *(["cost"] if prices else [])]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(path: Path, text: str) -> None:
    """Puts a text between a file's marks.

    Raises:
      ValueError: it has none.
    """
    old = path.read_text(encoding="utf-8")
    before, mark, rest = old.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{path} has no marks {' ... '.join(MARKS)}")
    path.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="sdxl", help="module of configs/, NAME[:VARIANT]")
    parser.add_argument("--model", help="in place of the recipe's")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--price", default="", help="of a chip-hour: v5e=1.2,h100=3")
    parser.add_argument("--store", default="~/.cache/tlcm_jax/plans")
    parser.add_argument("--write", type=Path, help="a file with marks")
    args = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tlcm_jax.plan import plan_recipe

    module, _, variant = args.config.partition(":")
    config = importlib.import_module(f"configs.{module}").get_config(variant).to_dict()
    if args.model:
        config["model"]["path"] = args.model
    named = (pair.partition("=") for pair in filter(None, args.price.split(",")))
    prices = {kind: float(price) for kind, _, price in named}
    rows = []
    for name in args.topologies:
        planner, plans = plan_recipe(config, name, args.store)
        rows.append(row(name, plans, planner.topology, prices))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = table(rows, prices)
    print(text)
    if args.write:
        write(args.write, text)


if __name__ == "__main__":
    main()
