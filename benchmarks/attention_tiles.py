"""The compiler's schedule of the splash kernel, by tile: what `models/splash.py` chose by.

    python -m benchmarks.attention_tiles --device v5e --length 4096 --heads 10

Compiles forward and gradient of one picture's self-attention for each pair of tiles, without a TPU,
in a process each, and counts the instruction bundles of the kernels' final schedules (a bundle is
issued a cycle). A kernel's loop runs its tiles one after another, so tiles x bundles bounds its
cycles from above: what is done once a row of tiles is counted in each. Modelled, not measured.
Needs `pip install -e '.[plan]'`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tlcm_jax.planning.topologies import DEVICES


def schedule(device: str, length: int, heads: int, width: int, tiles: tuple[int, int, int]) -> None:
    """Compiles the gradient of one attention; the compiler writes its schedules as it was asked."""
    import jax
    import jax.numpy as jnp

    from tlcm_jax.models import splash
    from tlcm_jax.planning.aot import single_device

    splash.TILES = splash.Tiles(*tiles)
    place = single_device(DEVICES[device].smallest)
    x = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16, sharding=place)

    def total(q, k, v):
        return jnp.sum(splash.attend(q, k, v).astype(jnp.float32))

    jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(x, x, x).compile()


def bundles(folder: Path) -> dict[str, int]:
    """Bundles of the kernels' final schedules, by kernel."""
    found = {}
    for file in folder.glob("*splash*schedule-analysis_final_bundles.txt"):
        match = re.search(r"total scheduled bundles:\s+(\d+)", file.read_text(errors="replace"))
        if match:
            found["backward" if "dkv" in file.name else "forward"] = int(match[1])
    return found


def main() -> None:
    """Prints a line for each choice of tiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name, device in DEVICES.items() if device.compiled]
    parser.add_argument("--device", default="v5e", choices=known)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--tiles", type=int, nargs=3, action="append", help="q, kv, kv at once")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        schedule(args.device, args.length, args.heads, args.width, tuple(args.tiles[0]))
        return
    device = DEVICES[args.device]
    for tiles in args.tiles or [(512, 512, 512), (1024, 1024, 1024), (1024, 2048, 1024)]:
        with tempfile.TemporaryDirectory() as folder:
            asked = [sys.executable, "-m", "benchmarks.attention_tiles", "--only"]
            for name in ("device", "length", "heads", "width"):
                asked += [f"--{name}", str(getattr(args, name))]
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            env = {**os.environ, "LIBTPU_INIT_ARGS": dump, "JAX_COMPILATION_CACHE_DIR": ""}
            done = subprocess.run(
                [*asked, "--tiles", *map(str, tiles)], env=env, capture_output=True, text=True
            )
            if done.returncode:
                print(f"tiles {tiles}: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
                continue
            steps = args.heads * (args.length // tiles[0]) * (args.length // tiles[1])
            operations = 4 * args.length**2 * args.width * args.heads
            for name, count in sorted(bundles(Path(folder)).items()):
                seconds = steps * count / device.clock
                work = operations * (2.5 if name == "backward" else 1)
                print(
                    f"tiles {tiles}, {name}: {steps} x {count} bundles, {1e3 * seconds:.2f} ms, "
                    f"{100 * work / seconds / device.peak:.0f} % of the peak",
                    flush=True,
                )


if __name__ == "__main__":
    main()
