"""Milliseconds a picture: this library against diffusers with PyTorch, on the same CPU.

    python -m benchmarks.sampling --model miniature/emoji-xl

Both go all the way from text to pixels with the same weights and timesteps: tokenizer, text
encoders, four UNet evaluations without guidance, autoencoder. They take turns in one process
(ours, theirs, ours, theirs), after both have compiled or warmed up, on the same cores; what is
compared are the medians. Needs `pip install -e '.[verify]'`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

PROMPT = "a 3D render of a red apple"


def restrict_cores(threads: int) -> int:
    """Keeps this process to so many cores, 0 for all it has; returns how many those are.

    Before JAX is imported, since it sizes its thread pool by the cores it may use.
    """
    cores = sorted(os.sched_getaffinity(0))
    if threads:
        os.sched_setaffinity(0, cores[:threads])
    return len(os.sched_getaffinity(0))


def ours(model: str, steps: int) -> Callable[[list[str]], object]:
    """A function that draws prompts with this library."""
    from tlcm_jax.families.load import load_model
    from tlcm_jax.generation.generate import generate

    pipeline = load_model(model)
    return lambda prompts: generate(pipeline, prompts, steps, seed=0)


def theirs(model: str, steps: int, threads: int) -> Callable[[list[str]], object]:
    """A function that draws prompts with diffusers."""
    import diffusers
    import torch

    from tlcm_jax.diffusion.timesteps import student_timesteps

    torch.set_num_threads(threads)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    timesteps = list(student_timesteps(steps))

    def draw(prompts: list[str]) -> object:
        return pipeline(
            prompt=prompts, timesteps=timesteps, guidance_scale=0.0, output_type="np"
        ).images

    return draw


def milliseconds(draw: Callable[[list[str]], object], batch: int, seconds: float) -> list[float]:
    """Times of single draws of a batch, in milliseconds a picture, for about so many seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        draw([PROMPT] * batch)
        times.append(1000 * (time.perf_counter() - start) / batch)
    return times


def main() -> None:
    """Prints one line a batch size, and exits with an error if ours is the slower one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="miniature/emoji-xl", help="a diffusers folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=0, help="cores for both; 0 takes all")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    args = parser.parse_args()

    threads = restrict_cores(args.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import diffusers
    import jax
    import torch

    samplers = {
        f"tlcm_jax (jax {jax.__version__})": ours(args.model, args.steps),
        f"diffusers {diffusers.__version__} (torch {torch.__version__})": theirs(
            args.model, args.steps, threads
        ),
    }
    print(
        f"{args.model}, {args.steps} steps, fp32; {threads} cores, torch with "
        f"{torch.get_num_threads()} threads; load average before {os.getloadavg()[0]:.1f}"
    )
    slower = False
    for batch in args.batches:
        for draw in samplers.values():
            draw([PROMPT] * batch)
        turns: dict[str, list[list[float]]] = {name: [] for name in samplers}
        for _ in range(2):
            for name, draw in samplers.items():
                turns[name].append(milliseconds(draw, batch, args.seconds))
        medians = []
        for name, (first, second) in turns.items():
            medians.append(statistics.median(first + second))
            print(
                f"batch {batch}: {medians[-1]:8.2f} ms a picture  {name}; "
                f"turns {statistics.median(first):.2f}, {statistics.median(second):.2f} "
                f"({len(first)}, {len(second)} draws)"
            )
        print(f"batch {batch}: ours takes {medians[0] / medians[1]:.2f} of the other's time")
        slower = slower or medians[0] > medians[1]
    if slower:
        sys.exit("ours is slower")


if __name__ == "__main__":
    main()
