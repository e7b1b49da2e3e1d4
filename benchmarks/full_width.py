"""The SDXL UNet at its true width against diffusers, one after the other, under 20 GB.

    python -m benchmarks.full_width --config sdxl/unet/config.json

Each implementation runs in a process of its own, so that only one holds the 10.3 GB of fp32
weights: random ones, drawn tensor by tensor from a seed that the tensor's name gives, the same
for both. Latents are 32 x 32. Prints the relative error (norm of the difference over the norm),
each one's peak memory and the seconds of a forward (the fastest of four after the first), and exits
with an error if the first is above 1e-5 or a peak above 20 GB. Needs `pip install -e '.[verify]'`,
and some minutes.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-5
MEMORY = 20e9


class RandomTensors(Mapping[str, np.ndarray]):
    """Checkpoint tensors by name, drawn when they are asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        if len(shape) > 1:
            noise /= np.float32(math.sqrt(math.prod(shape[1:])))
            return noise
        noise *= np.float32(0.1)
        return noise + np.float32("norm" in name and name.endswith("weight"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def draw_inputs(config: Mapping[str, Any], side: int) -> dict[str, np.ndarray]:
    """Inputs by the names that our UNet gives them; latents `[1, side, side, c]`."""
    rng = np.random.default_rng(0)
    embedded = 6 * config["addition_time_embed_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - embedded
    shapes = {
        "sample": (1, side, side, config["in_channels"]),
        "encoder_hidden_states": (1, 77, config["cross_attention_dim"]),
        "text_embeds": (1, pooled),
    }
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    time_ids = np.array([[1024, 1024, 0, 0, 1024, 1024]], np.float32)
    return inputs | {"timesteps": np.array([500]), "time_ids": time_ids}


def run_ours(
    config: Mapping[str, Any], inputs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Our output, NHWC, and the seconds of a forward."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import flax.traverse_util
    import jax
    import jax.numpy as jnp

    from tlcm_jax.families.base import abstract_params
    from tlcm_jax.io import names
    from tlcm_jax.models.unet import UNet2DConditionModel
    from tlcm_jax.models.unet_config import UNetConfig

    net = UNet2DConditionModel(UNetConfig.from_dict(config))
    shapes = flax.traverse_util.flatten_dict(abstract_params(net))
    torch_shapes = {
        names.torch_key(path): names.to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
        for path, leaf in shapes.items()
    }
    tensors, params = RandomTensors(torch_shapes), {}
    for path in shapes:  # one at a time: a tree in host memory and one on the device are too much
        value = names.to_flax_layout(path, tensors[names.torch_key(path)])
        params[path] = jnp.asarray(value)
    tree = flax.traverse_util.unflatten_dict(params)
    forward = jax.jit(lambda params, inputs: net.apply({"params": params}, **inputs))
    return timed(lambda: np.asarray(forward(tree, dict(inputs))))


def run_theirs(
    config: Mapping[str, Any], inputs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Diffusers' output, NHWC, and the seconds of a forward."""
    import diffusers
    import torch

    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel.from_config(config).eval()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    drawn = {name: torch.from_numpy(value) for name, value in RandomTensors(shapes).items()}
    net.load_state_dict(drawn, assign=True)
    del drawn
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}

    @torch.no_grad()
    def forward() -> np.ndarray:
        output = net(
            given["sample"].permute(0, 3, 1, 2),
            given["timesteps"],
            given["encoder_hidden_states"],
            added_cond_kwargs={key: given[key] for key in ("text_embeds", "time_ids")},
        ).sample
        return output.permute(0, 2, 3, 1).numpy()

    return timed(forward)


def timed(forward: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What a function returns, and the seconds of its fastest call after the first."""
    output, seconds = forward(), []
    for _ in range(4):
        started = time.perf_counter()
        forward()
        seconds.append(time.perf_counter() - started)
    return output, min(seconds)


def run_apart(side: str, config: Path, latents: int, folder: Path) -> tuple[np.ndarray, float]:
    """Runs one implementation in a process of its own: its output, and its peak memory in bytes."""
    output = folder / f"{side}.npz"
    command = [sys.executable, "-m", "benchmarks.full_width", "--config", str(config)]
    command += ["--latents", str(latents), "--only", side, "--output", str(output)]
    subprocess.run(command, check=True)
    with np.load(output) as result:
        peak = float(result["peak"])
        print(f"{side}: peak {peak / 1e9:.2f} GB, a forward {result['seconds']:.2f} s", flush=True)
        return result["output"], peak


def main() -> None:
    """Compares both, or with --only is one of the processes that do so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="an SDXL UNet's config.json")
    parser.add_argument("--latents", type=int, default=32, help="their side")
    parser.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        config = json.loads(args.config.read_text(encoding="utf-8"))
        run = run_ours if args.only == "ours" else run_theirs
        output, seconds = run(config, draw_inputs(config, args.latents))
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        np.savez(args.output, output=output, peak=peak, seconds=seconds)
        return

    with tempfile.TemporaryDirectory() as folder:
        theirs, their_peak = run_apart("theirs", args.config, args.latents, Path(folder))
        ours, our_peak = run_apart("ours", args.config, args.latents, Path(folder))
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    print(f"relative error {error:.2e} (norm of theirs {np.linalg.norm(theirs):.3g})")
    if not error <= TOLERANCE:
        sys.exit(f"the relative error is above {TOLERANCE}")
    if max(our_peak, their_peak) > MEMORY:
        sys.exit(f"a peak is above {MEMORY / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
