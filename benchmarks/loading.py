"""Gigabytes a second from a checkpoint on disk to parameters on the device, and peak memory.

    python -m benchmarks.loading                # SDXL's UNet in bf16, 5.1 GB, written to a folder
    python -m benchmarks.loading --scale 0.2    # the same at a fifth of its width, a first trial

Random weights of SDXL's shapes are written once. Then this library (open, check against the
config, lay out, put on the default device) and `safetensors.numpy.load_file` alone take turns, each
in a process of its own, on a file that lies in the page cache. Ends with an error below 70 % of
safetensors' speed. Tracing the network for its shapes is not part of it; a run does it once.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHARE = 0.7
FILE = "diffusion_pytorch_model.safetensors"
SHAPES = "shapes.json"


def config(scale: float) -> dict:
    """SDXL's UNet config, its widths times `scale` in heads of 64."""
    heads = max(1, round(5 * scale))
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [heads, 2 * heads, 4 * heads],
        "block_out_channels": [64 * heads, 128 * heads, 256 * heads],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    }


def write(folder: Path, scale: float) -> None:
    """Writes the checkpoint, and the shapes of the tree that it fills."""
    import flax.traverse_util
    from safetensors.numpy import save_file

    from tlcm_jax.families.base import abstract_params
    from tlcm_jax.io.names import to_torch_layout, torch_key
    from tlcm_jax.models.unet import UNet2DConditionModel
    from tlcm_jax.models.unet_config import UNetConfig

    tree = abstract_params(UNet2DConditionModel(UNetConfig.from_dict(config(scale))))
    rng = np.random.default_rng(0)
    shapes, tensors = {}, {}
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        shapes["/".join(path)] = leaf.shape
        shape = to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
        tensors[torch_key(path)] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / FILE)
    (folder / SHAPES).write_text(json.dumps(shapes))


def load_ours(folder: Path) -> object:
    """Parameters on the device, by this library."""
    import flax.traverse_util
    import jax

    from tlcm_jax.io import names
    from tlcm_jax.io.placement import to_devices
    from tlcm_jax.io.tensors import open_component

    stored = json.loads((folder / SHAPES).read_text())
    shapes = flax.traverse_util.unflatten_dict(
        {
            tuple(name.split("/")): jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16)
            for name, shape in stored.items()
        }
    )
    jax.device_put(np.zeros(8)).block_until_ready()  # starts the device
    return lambda: _timed(
        lambda: (
            tensors := open_component(folder, "diffusion_pytorch_model"),
            to_devices(names.match_tensors(tensors, shapes, str(folder)), shapes, tensors.release),
        )[1]
    )


def load_theirs(folder: Path) -> object:
    """Arrays in host memory, as they are stored, by safetensors."""
    from safetensors.numpy import load_file

    return lambda: _timed(lambda: load_file(folder / FILE))


def _timed(load) -> dict:
    before = _memory("VmRSS")
    start = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - start
    del kept
    return {"seconds": seconds, "peak": _memory("VmHWM") - before}


def _memory(field: str) -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+)", status)
    return 1024 * int(found[1]) if found else 0


def measure(who: str, folder: Path) -> dict:
    """One loading in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", who, "--folder", folder]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints both speeds and peaks; exits with an error if ours is below its share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of SDXL's widths")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        load = {"ours": load_ours, "theirs": load_theirs}[args.measure](args.folder)
        print(json.dumps(load()))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write(folder, args.scale)
        size = (folder / FILE).stat().st_size
        for _ in iter((folder / FILE).open("rb", buffering=2**24).readline, b""):
            pass  # into the page cache, so that both read from there
        results = {"theirs": [], "ours": []}
        for _ in range(args.repeats):
            for who, found in results.items():
                found.append(measure(who, folder))
    speed = {}
    for who, label in (("theirs", "safetensors alone"), ("ours", "this library, to the device")):
        seconds = statistics.median(result["seconds"] for result in results[who])
        peak = max(result["peak"] for result in results[who])
        speed[who] = size / seconds / 1e9
        print(f"{label}: {speed[who]:.2f} GB/s, peak memory {peak / size:.2f} of the file's size")
    share = speed["ours"] / speed["theirs"]
    print(f"{size / 1e9:.2f} GB: {share:.0%} of safetensors' speed (at least {SHARE:.0%} wanted)")
    if share < SHARE:
        sys.exit("loading is slower than it should be")


if __name__ == "__main__":
    main()
