"""How many steps a *perfect* teacher needs in this world, by the scale of the latents.

    python -m miniature.shapes.exact_denoiser --codec DIR/codec.npz

The exact Bayes denoiser E[x0 | z_t, caption] over a finite set of real latents: one red star on
one fixed ground, at every second pixel, in three rotations. Without guidance the caption's
set is all there is; with it, the unconditional set is eight kinds of object. A sample is right
if its squared distance from the nearest member is under a fifth of an object's energy.

    ddim     deterministic, equal steps
    renoise  the student's sampler and times: x0, then fresh noise; the last x0 counts

The sampling is numpy; a few minutes on one core.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from miniature.shapes.codec import LinearCodec, centred
from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, SIDE, Group, Scene, Spec, draw_scene
from tlcm_jax.diffusion.timesteps import student_timesteps

_ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
_KINDS = (
    ("star", "red"),
    ("circle", "blue"),
    ("heart", "yellow"),
    ("square", "green"),
    ("ring", "purple"),
    ("moon", "orange"),
    ("cross", "pink"),
    ("triangle", "cyan"),
)
_TOLERANCE = 0.2


def latents(codec: LinearCodec, kind: tuple[str, str], size: str, step: float) -> np.ndarray:
    """Latents `[n, 1536]` of one object at places `step` pixels apart, in three rotations."""
    group = Group(shape=kind[0], colour=kind[1], size=size)
    scene = draw_scene(Spec(groups=(group,)), 0, RUNGS["r1"])
    thing = scene.things[0]
    spots = np.arange(thing.radius + 1, SIDE - thing.radius - 1, step)
    pictures = []
    for rotation in (-0.25, 0.0, 0.25):
        for x in spots:
            for y in spots:
                moved = dataclasses.replace(thing, x=x, y=y, rotation=rotation)
                pictures.append(_draw(scene, (moved,)))
    encoded = [codec.encode(centred(np.stack(pictures[i : i + 500])))
               for i in range(0, len(pictures), 500)]  # fmt: skip
    return np.concatenate(encoded).reshape(len(pictures), -1).astype(np.float32)


def _draw(scene: Scene, things: tuple) -> np.ndarray:
    return render(dataclasses.replace(scene, things=things))


def denoise(z: np.ndarray, members: np.ndarray, norms: np.ndarray, t: int) -> np.ndarray:
    """E[x0 | z] over `members`, equally likely beforehand."""
    alpha, variance = _ABAR[t] ** 0.5, 1 - _ABAR[t]
    likelihood = (alpha * z @ members.T - 0.5 * alpha**2 * norms) / variance
    weight = np.exp(likelihood - likelihood.max(1, keepdims=True))
    return (weight / weight.sum(1, keepdims=True)) @ members


def sample(
    own: np.ndarray,
    every: np.ndarray,
    times: tuple[int, ...],
    scale: float,
    fresh: bool,
    batch: int,
) -> np.ndarray:
    """The last x0 of `batch` samples."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(batch, own.shape[1])).astype(np.float32)
    own_norms, every_norms = (own**2).sum(1), (every**2).sum(1)
    for i, t in enumerate(times):
        x0 = denoise(z, own, own_norms, t)
        if scale != 1:
            null = denoise(z, every, every_norms, t)
            x0 = null + scale * (x0 - null)
        if i + 1 < len(times):
            alpha, sigma = _ABAR[t] ** 0.5, (1 - _ABAR[t]) ** 0.5
            noise = rng.normal(size=z.shape) if fresh else (z - alpha * x0) / sigma
            after = times[i + 1]
            z = (_ABAR[after] ** 0.5 * x0 + (1 - _ABAR[after]) ** 0.5 * noise).astype(np.float32)
    return x0


def right(
    own: np.ndarray,
    every: np.ndarray,
    *,
    steps: int,
    scale: float,
    fresh: bool,
    batch: int,
) -> float:
    """Share of samples near a member of the caption's set, with the student's sampler or DDIM."""
    energy = float((own**2).sum(1).mean())
    even = tuple(np.round(np.linspace(999, 0, steps + 1))[:-1].astype(int))
    x0 = sample(own, every, student_timesteps(steps) if fresh else even, scale, fresh, batch)
    distances = (x0**2).sum(1)[:, None] - 2 * x0 @ own.T + (own**2).sum(1)
    return float(np.mean(distances.min(1) < _TOLERANCE * energy))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--energies", type=float, nargs="*", default=[100, 20, 10, 5, 2.5])
    parser.add_argument("--sizes", nargs="*", default=["small", "large"])
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    codec = LinearCodec.load(args.codec)
    for size in args.sizes:
        every = np.concatenate([latents(codec, kind, size, 2.0) for kind in _KINDS])
        own = every[: len(every) // len(_KINDS)]
        # About the empty picture: it is one constant, which any denoiser knows.
        centre = np.median(own, axis=0)
        own, every = own - centre, every - centre
        raw = float((own**2).sum(1).mean())
        print(
            f"{size}: {len(own)} pictures of one caption, {len(every)} of eight, energy {raw:.0f}"
        )
        for energy in args.energies:
            factor = np.float32((energy / raw) ** 0.5)
            cells = []
            for scale in (1.0, 4.0):
                runs = [(k, False) for k in (4, 8, 25)] + [(k, True) for k in (2, 3, 4, 8)]
                shares = [
                    right(own * factor, every * factor, steps=k, scale=scale, fresh=fresh,
                          batch=args.batch)
                    for k, fresh in runs
                ]  # fmt: skip
                cells.append(" ".join(f"{v:.2f}" for v in shares))
            print(f"energy {energy:5.1f}, scaling factor {factor:.3f}, ddim 4 8 25 renoise 2 3 4 8:"
                  f"  w 1: {cells[0]}   w 4: {cells[1]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
