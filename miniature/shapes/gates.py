"""Measures the gates: the world is hard for few steps, and its teacher is right in many.

    python -m miniature.shapes.gates --model DIR/shapes-xl --rung r1

prints, on the rung's test prompts: the parser on real renders and through the autoencoder; the
teacher in 25 DDIM steps at each guidance scale, by task; DDIM in 4 steps; the undistilled network
in the student's sampler in 2, 3 and 4 steps, without and with guidance; and at w = 1 the
total-variation distance of the attributes that a caption leaves open from their known
distribution, with the value that as many real renders have. With `--codec` the linear codec
decodes instead of the folder's decoder. `--sheet` also writes pictures.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from miniature.shapes import open_attributes, prompts
from miniature.shapes import parser as judge
from miniature.shapes.codec import LinearCodec
from miniature.shapes.scene import RUNGS, SIDE, Rung, Spec
from miniature.shapes.scorer import parsed, reals
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.sampling import sample, sample_teacher
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.families.load import load_model

_BATCH = 64


def score(images: np.ndarray, specs: Sequence[Spec], rung: Rung) -> tuple[np.ndarray, np.ndarray]:
    """All-checks and malformed, `[n]` truth values each."""
    found = [parsed(image, rung) for image in images]
    right = np.array([judge.satisfies(f, s) for f, s in zip(found, specs, strict=True)])
    return right, np.array([bool(f.malformed) for f in found])


def draw_all(draw: Callable, noise: jax.Array, conditioning, decode: Callable) -> np.ndarray:
    """Pictures of every prompt, uint8, in batches of one size."""
    pictures = []
    count = len(noise)
    for start in range(0, count, _BATCH):
        rows = np.arange(start, start + _BATCH) % count
        part = jax.tree.map(lambda x: x[rows], conditioning)  # noqa: B023
        pictures.append(decode(draw(noise[rows], part, jax.random.key(start))))
    images = np.concatenate(pictures)[:count]
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rung", choices=RUNGS, required=True)
    parser.add_argument("--codec", type=Path, help="decode by the linear codec")
    parser.add_argument("--scales", type=float, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--count", type=int, default=192, help="test prompts")
    parser.add_argument("--open", type=int, default=0, help="samples for the open attributes")
    parser.add_argument("--sheet", type=Path, help="folder for pictures")
    parser.add_argument("--ceiling", action="store_true", help="only real renders: no teacher")
    args = parser.parse_args()

    rung = RUNGS[args.rung]
    model = load_model(args.model)
    process, scale = model.process, model.vae.config.scaling_factor
    per_task = -(-args.count // len(prompts.tasks(rung)))
    entries = prompts.test_entries(rung, per_task)
    specs = [prompts.spec_of(entry) for entry in entries]
    names = np.array([entry["task"] for entry in entries])
    decode: Callable = model.decode
    if args.codec:
        linear = LinearCodec.load(args.codec)
        decode = lambda z: linear.decode(np.asarray(z) / scale) / 2 + 0.5  # noqa: E731

    def report(label: str, images: np.ndarray) -> None:
        right, malformed = score(images, specs, rung)
        tasks = ", ".join(f"{t} {right[names == t].mean():.3f}" for t in dict.fromkeys(names))
        print(f"{label:34s} {right.mean():.3f}  malformed {malformed.mean():.3f}  ({tasks})",
              flush=True)  # fmt: skip
        if args.sheet:
            args.sheet.mkdir(parents=True, exist_ok=True)
            picked = images[np.linspace(0, len(images) - 1, 48).astype(int)]
            rows = picked.reshape(4, 12, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
            sheet = Image.fromarray(rows.reshape(4 * SIDE, 12 * SIDE, 3))
            sheet.save(args.sheet / f"{label.replace(' ', '-').replace(',', '')}.png")

    real = reals(specs, rung)
    report("real renders", real)
    encode = jax.jit(model.encode_images)
    starts = range(0, len(real), _BATCH)
    latents = np.concatenate([encode(real[i : i + _BATCH] / np.float32(255)) for i in starts])
    report("through the autoencoder", _decoded(decode, latents))
    sigma = float(process.sigma(np.zeros(1, np.int32))[0])
    noisy = latents + sigma * np.random.default_rng(0).normal(size=latents.shape)
    report("with the noise of time 0", _decoded(decode, noisy.astype(np.float32)))

    if args.ceiling:
        return

    conditioning = model.encode([entry["prompt"] for entry in entries])
    null_of = functools.partial(model.null_of, model.null_conditioning())
    noise = jax.random.normal(jax.random.key(1), (len(specs), *model.latent_shape()))
    denoiser = model.denoiser(model.params["unet"])

    def teacher(steps: int, w: float) -> Callable:
        return jax.jit(lambda z, c, key: sample_teacher(denoiser, process, z, c, null_of, steps, w))

    def student(steps: int, w: float) -> Callable:
        network = guided(denoiser, w, null_of)
        times = student_timesteps(steps)
        return jax.jit(
            lambda z, c, key: sample(network, process, z, c, times, jax.random.split(key, len(z)))
        )

    best, top = args.scales[-1], -1.0
    for w in args.scales:
        images = draw_all(teacher(25, w), noise, conditioning, decode)
        right = score(images, specs, rung)[0].mean()
        best, top = (w, right) if right > top else (best, top)
        report(f"teacher, 25 steps, w {w:g}", images)
    report(f"teacher, 4 steps, w {best:g}", draw_all(teacher(4, best), noise, conditioning, decode))
    for w in sorted({1.0, best if best != 1 else 2.0}):
        for steps in (2, 3, 4):
            images = draw_all(student(steps, w), noise, conditioning, decode)
            report(f"undistilled, {steps} steps, w {w:g}", images)

    if args.open:
        entries = prompts.open_entries(rung, args.open)
        opened = [prompts.spec_of(entry) for entry in entries]
        texts = model.encode([entry["prompt"] for entry in entries])
        shape = (len(opened), *model.latent_shape())
        noise = jax.random.normal(jax.random.key(2), shape)
        for label, images in (
            ("real renders", reals(opened, rung)),
            ("teacher, 25 steps, w 1", draw_all(teacher(25, 1.0), noise, texts, decode)),
            (f"teacher, 25 steps, w {best:g}", draw_all(teacher(25, best), noise, texts, decode)),
        ):
            found = open_attributes.distances(images, opened, rung)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"total variation, {label}: {shown}", flush=True)


def _decoded(decode: Callable, latents: np.ndarray) -> np.ndarray:
    images = [np.asarray(decode(latents[i : i + _BATCH])) for i in range(0, len(latents), _BATCH)]
    return np.round(255 * np.clip(np.concatenate(images), 0, 1)).astype(np.uint8)


if __name__ == "__main__":
    main()
