"""What saving costs a run: its part of the time between two checkpoints.

    python -m benchmarks.save_share --config configs/emoji.py

Trains a few updates of the recipe's first stage and saves the state that they end with again and
again: how long the run waits for a save (the state is copied), how long the rest takes in the
background (files, sums and fsync), and both against the time of `checkpoint_every` updates. Without
a free core the background's time is the run's as well; with one, the copy alone is.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from tlcm_jax.config.run import train
from tlcm_jax.config.schema import Settings
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.loop import Hook
from tlcm_jax.training.positions import Position


def read_recipe(path: Path, updates: int) -> dict[str, Any]:
    """A recipe's first stage, of so many updates, without evaluation and export."""
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().to_dict()
    first = (config.get("stage_order") or list(config["stages"]))[0]
    stage = {**config["stages"][first], "steps": updates, "warmup_steps": 0}
    return config | {
        "stages": {first: stage}, "stage_order": [first], "log_every": 1, "sample_every": 0,
        "evaluation": None, "export": [],
    }  # fmt: skip


def main() -> None:
    """Trains, saves, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--saves", type=int, default=7)
    args = parser.parse_args()
    found: dict[str, Any] = {}

    def hooks(settings: Settings, model: Any) -> list[Hook]:
        def measure(position: Position, state: Any) -> None:
            found["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.networks))
            waits, wholes = [], []
            with tempfile.TemporaryDirectory() as folder:
                checkpoints = Checkpoints(folder)
                for number in range(args.saves + 1):
                    begun = time.perf_counter()
                    checkpoints.save(Position(0, position.name, 0, number + 1), state)
                    waits.append(time.perf_counter() - begun)
                    checkpoints.wait()
                    wholes.append(time.perf_counter() - begun)
                checkpoints.close()
            # The first opens what the others find open.
            found["wait"], found["whole"] = (statistics.median(x[1:]) for x in (waits, wholes))
            found["every"] = settings.checkpoint_every

        return [Hook(every=args.updates, call=measure)]

    with tempfile.TemporaryDirectory() as workdir:
        config = read_recipe(args.config, args.updates)
        result = train(config, Path(workdir) / "run", progress=False, make_hooks=hooks)
    rows = result.history[1:]  # without the row that compiles
    update = statistics.median(row["pairs"] / row["pairs_per_second"] for row in rows)
    interval = found["every"] * update
    print(
        f"state {found['bytes'] / 1e6:.1f} MB; a save: the run waits {1e3 * found['wait']:.0f} ms, "
        f"on the disk with its sums after {1e3 * found['whole']:.0f} ms\n"
        f"an update {1e3 * update:.0f} ms, {found['every']} of them between checkpoints: "
        f"{100 * found['wait'] / interval:.2f} % of an interval is waited for, "
        f"{100 * found['whole'] / interval:.2f} % with what runs beside it"
    )


if __name__ == "__main__":
    main()
