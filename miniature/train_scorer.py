"""Trains the miniature's scorer of pictures and texts, which preference can follow.

    python -m miniature.train_scorer --data emoji32.npz --output miniature/scorer

Contrastive (`miniature/contrastive.py`): augmented real pictures of the training split against
their captions. It shares no weight, no label and no network with the judge, which stays the one
that nothing follows. Prints how often a held-out picture finds its caption among 100.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from miniature.augment import augment
from miniature.contrastive import ContrastiveNetwork, ContrastiveScorer, words
from tlcm_jax.training.fit import cosine, fit


def batches(images: np.ndarray, texts: np.ndarray, size: int) -> Iterator[dict]:
    """Endless batches of distinct pictures, each with one of its captions' words."""
    rng = np.random.default_rng(0)
    while True:
        rows = rng.choice(len(images), size, replace=False)
        captions = rng.integers(texts.shape[1], size=size)
        yield dict(images=images[rows].astype(np.float32) / 255, texts=texts[rows, captions])


def contrast(network: ContrastiveNetwork):
    """`(params, batch, key) -> (loss, metrics)`: symmetric InfoNCE, texts equal or not."""

    def loss(params: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        pictures = augment(key, batch["images"])
        image, text = network.apply({"params": params["network"]}, pictures, batch["texts"])
        logits = jnp.exp(jnp.minimum(params["scale"], jnp.log(100.0))) * (image @ text.T)
        right = jnp.diagonal(logits)
        both = 0.5 * (jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1))
        hits = jnp.mean(jnp.argmax(logits, 1) == jnp.arange(len(logits)))
        return jnp.mean(both - right), {"top1": hits}

    return loss


def main() -> None:
    """Trains, reports and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="emoji32.npz")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--workdir", type=Path, default=Path("runs/miniature-scorer"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()

    data = np.load(args.data)
    images, held, captions = data["images"], data["composition"], data["captions"]
    texts = words(captions.reshape(-1).tolist()).reshape(*captions.shape, -1)
    network = ContrastiveNetwork(resolution=images.shape[1])
    first = jnp.zeros((1, *images.shape[1:]))
    params = network.init(jax.random.key(0), first, texts[:1, 0])["params"]
    trained = fit(
        contrast(network),
        {"network": params, "scale": jnp.log(20.0)},
        batches(images[~held], texts[~held], args.batch),
        steps=args.steps,
        learning_rate=cosine(2e-3, args.steps),
        workdir=args.workdir,
        ema_decay=0.99,
    )["network"]

    rows = np.flatnonzero(held)[:100]
    pictures = images[rows].astype(np.float32) / 255
    image, text = network.apply({"params": trained}, pictures, texts[rows, 0])
    cosines = np.asarray(image @ text.T)
    hits = float(np.mean(cosines.argmax(1) == np.arange(len(rows))))
    # Good enough is what real pictures score with their own captions.
    threshold = round(100 * float(np.diagonal(cosines).mean()), 2)
    print(f"held-out: caption found among 100: {hits:.3f}, own caption scores {threshold}")
    ContrastiveScorer(network, trained, threshold).save(args.output)


if __name__ == "__main__":
    main()
