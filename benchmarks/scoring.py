"""Images a second of the CLIP score: this library against open_clip with PyTorch, on the same CPU.

    python -m benchmarks.scoring --architecture ViT-L-14 --batch 4 --rounds 5

Both run both towers on the same random weights, prepared pixels and token ids, in fp32. They take
turns in one process (ours, theirs, ours, theirs) after a first call each; what is compared are the
best of the rounds, in time and in CPU seconds. Needs `pip install -e '.[verify]' open_clip_torch`.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np

from benchmarks.sampling import restrict_cores


def sides(architecture: str, batch: int, threads: int) -> dict[str, Callable[[], np.ndarray]]:
    """Our towers' and open_clip's on the same batch: functions that give the image features."""
    import jax
    import open_clip
    import torch
    from open_clip.model import CLIP

    from tests.support.scorer_files import open_clip_tensors
    from tests.support.tiny_pipeline import random_params
    from tlcm_jax.io.clip_files import clip_shapes
    from tlcm_jax.models.clip import ARCHITECTURES, CLIPModel

    torch.set_num_threads(threads)
    config = ARCHITECTURES[architecture]
    params = random_params(clip_shapes(config), np.random.default_rng(0))
    configs = pathlib.Path(open_clip.__file__).parent / "model_configs"
    network = CLIP(**json.loads((configs / f"{architecture}.json").read_text())).eval()
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in open_clip_tensors(params).items()}
    network.load_state_dict(tensors)

    side, rng = config.vision.image_size, np.random.default_rng(1)
    pixels = rng.normal(size=(batch, side, side, 3)).astype(np.float32)
    ids = rng.integers(1, 40000, (batch, 77))
    ids[:, 20] = 49407  # the end, where the text's feature is read
    params, apply = jax.device_put(params), jax.jit(CLIPModel(config).apply)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    tokens = torch.from_numpy(ids)

    def ours() -> np.ndarray:
        return np.asarray(apply({"params": params}, pixels, ids)[0])

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            return network(channels_first, tokens)[0].numpy()

    return {"tlcm_jax": ours, "open_clip": theirs}


def main() -> None:
    """Prints both, and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="ViT-L-14")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="cores to use; 0: all")
    args = parser.parse_args()
    functions = sides(args.architecture, args.batch, restrict_cores(args.threads))
    first, second = (function() for function in functions.values())
    difference = np.linalg.norm(first - second) / np.linalg.norm(second)
    print(f"{args.architecture}, batch {args.batch}: features differ by {difference:.1e}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(args.rounds):
        for name, function in functions.items():
            wall, cpu = time.monotonic(), time.process_time()
            function()
            times[name].append((time.monotonic() - wall, time.process_time() - cpu))
    for name, measured in times.items():
        wall, cpu = (min(column) for column in zip(*measured, strict=True))
        print(f"{name:10s} {args.batch / wall:6.2f} images/s, {cpu:.2f} CPU s a batch")
    ours, theirs = (min(wall for wall, _ in measured) for measured in times.values())
    print(f"time, ours of theirs: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
