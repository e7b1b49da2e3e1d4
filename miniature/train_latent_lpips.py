"""Trains the miniature's latent LPIPS: it ranks changes of a picture as pixel LPIPS ranks them.

    python -m miniature.train_latent_lpips --data emoji32.npz --model miniature/emoji-xl \\
        --output miniature/latent_lpips

As `tlcm_jax.train_latent_lpips`, but pictures are changed and judged by `miniature/perceptual.py`.
"""

import argparse
from pathlib import Path

import numpy as np

from miniature.perceptual import SMALL, made_triplets
from tlcm_jax.families.load import load_model
from tlcm_jax.models.latent_lpips import LatentLPIPS
from tlcm_jax.train_latent_lpips import train


def main() -> None:
    """Trains, reports and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="emoji32.npz")
    parser.add_argument("--model", type=Path, required=True, help="pipeline, for its autoencoder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--workdir", type=Path, default=Path("runs/latent-lpips"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    args = parser.parse_args()

    pipeline = load_model(args.model)
    data = np.load(args.data)
    held = data["composition"]
    triplets, held_out = (
        made_triplets(data["images"][rows], pipeline.encode_images, args.batch, seed)
        for seed, rows in enumerate((~held, held))
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
