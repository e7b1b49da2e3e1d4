"""Random changes that a picture of an object survives, for training the judge.

A few-step generator draws the object slightly off its place, too soft, too grainy or too pale.
The judge should still know it, so it is trained on real pictures changed in those ways.
"""

import jax
import jax.numpy as jnp
from jax import Array


def augment(key: Array, images: Array) -> Array:
    """Shifts, scales, blurs, recolours and roughens pictures on white.

    Args:
      key: PRNG key, used here only.
      images: `[b, h, w, 3]`, 0 to 1.

    Returns:
      `[b, h, w, 3]`, 0 to 1; each picture changed in its own way.
    """
    keys = jax.random.split(key, len(images))
    return jax.vmap(_augment)(keys, images)


def blur(images: Array, sigma: float) -> Array:
    """Gaussian blur of `[b, h, w, 3]` by `sigma` pixels, with white beyond the edge."""
    return jax.vmap(lambda image: 1 - _blur(1 - image, jnp.float32(sigma)))(images)


def _augment(key: Array, image: Array) -> Array:
    keys = iter(jax.random.split(key, 9))

    def uniform(low: float, high: float, shape: tuple[int, ...] = ()) -> Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    side = image.shape[0]
    ink = 1 - image  # what lies beyond the edge is 0 here: white
    scale = uniform(0.85, 1.15) * (1 + uniform(-0.06, 0.06, (2,)))
    shift = uniform(-0.08, 0.08, (2,)) * side
    # Scaling about the centre.
    translation = side / 2 * (1 - scale) + shift
    ink = jax.image.scale_and_translate(
        ink, image.shape, (0, 1), scale, translation, "linear", antialias=False
    )
    # Half of the pictures stay sharp.
    ink = _blur(ink, jnp.maximum(uniform(-1.2, 1.2), 0))
    contrast, tint = uniform(0.85, 1.1), uniform(0.95, 1.05, (3,))
    ink = ink * contrast * tint
    grey = ink.mean(-1, keepdims=True)
    ink = grey + (ink - grey) * uniform(0.85, 1.1)
    noise = jax.random.normal(next(keys), image.shape) * uniform(0, 0.05)
    return jnp.clip(1 - ink + noise, 0, 1)


def _blur(ink: Array, sigma: Array) -> Array:
    """Separable Gaussian blur of `[h, w, c]`; a `sigma` of 0 changes nothing."""
    for axis in (0, 1):
        size = ink.shape[axis]
        offset = jnp.arange(size)[:, None] - jnp.arange(size)[None]
        weight = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)
        # Normalised by the full kernel's sum, so that ink near the edge leaks out, not in.
        full = jnp.exp(-0.5 * (jnp.arange(-size, size + 1) / jnp.maximum(sigma, 1e-3)) ** 2)
        ink = jnp.moveaxis(jnp.tensordot(weight / full.sum(), ink, (1, axis)), 0, axis)
    return ink
