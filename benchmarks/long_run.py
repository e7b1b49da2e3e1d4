"""A long run of a tiny model: memory, step time, open files and what is written, over its length.

    python -m benchmarks.long_run --steps 20000 2> log

The engine's stages, rows, checkpoints and progress bars on a linear regression, two stages of half
the steps each. Prints a row a twentieth of the run, and ends with an error if its last quarter
holds over 5 % more memory than the one before (of the same stage), or leaves more files open.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks.kill_soak import engine
from tlcm_jax.training.loop import Hook


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Runs, prints the table, judges."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    every = args.steps // 20
    seen: list[tuple[int, float, float, int]] = []
    began = [time.process_time()]

    def look(position: Any, state: Any) -> None:
        now = time.process_time()
        files = len(os.listdir("/proc/self/fd"))
        seen.append((position.total, resident(), 1000 * (now - began[0]) / every, files))
        began[0] = now
        total, memory, each, files = seen[-1]
        print(
            f"step {total:6}: {memory:4.0f} MB, {each:.2f} ms CPU a step, {files} files", flush=True
        )

    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        hook = Hook(every=every, call=look)
        engine(workdir, args.steps // 2, (hook,), log_every=10, checkpoint_every=500, progress=True)
        rows = (workdir / "metrics.jsonl").stat().st_size
        kept = len(list((workdir / "checkpoints").iterdir()))
    print(f"metrics.jsonl {rows / 1e6:.2f} MB, {kept} checkpoints kept")
    if os.path.isfile("/proc/self/fd/2"):
        print(f"standard error {os.stat('/proc/self/fd/2').st_size} bytes")
    quarter = len(seen) // 4
    first, second = seen[-2 * quarter : -quarter], seen[-quarter:]
    if max(row[1] for row in second) > 1.05 * max(row[1] for row in first):
        raise SystemExit("memory grew over the run")
    if second[-1][3] > first[-1][3]:
        raise SystemExit("files stay open")


if __name__ == "__main__":
    main()
