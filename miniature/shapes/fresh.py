"""Fresh renders for small networks that are trained on pictures: without end, from integers.

A render takes longer than a training step's share of it, so each serves several times: a pool
takes up a few new ones a step, and batches are drawn from it.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from miniature.shapes.render import render
from miniature.shapes.scene import RUNGS, Scene, Spec, draw_scene, draw_spec

_POOL, _USES = 4096, 4

Drawn = tuple[np.ndarray, Spec, Scene, int]


def fresh(first: int, size: int, rungs: Sequence[str]) -> Iterator[list[Drawn]]:
    """Endless batches of pictures, uint8 `[64, 64, 3]`, each with its spec, scene and integer.

    Args:
      first: step from which on batches are wanted; no integer before its is drawn again.
      size: of a batch.
      rungs: names, taken in turn; one named twice comes twice as often.
    """
    pool: deque[Drawn] = deque(maxlen=_POOL)
    rng = np.random.default_rng(first)
    new = -(-size // _USES)
    index = first * new
    while True:
        # The first batch is all new; one of the pool's length would otherwise repeat a few.
        for _ in range(new if pool else size):
            rung = RUNGS[rungs[index % len(rungs)]]
            spec = draw_spec(index, rung)
            scene = draw_scene(spec, index, rung)
            pool.append((render(scene), spec, scene, index))
            index += 1
        rows = rng.choice(len(pool), size, replace=False)
        yield [pool[row] for row in rows]


def roughen(key: Array, images: Float[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """Softens pictures and adds grain, each by its own amount, as decoders do; 0 to 1."""
    soft, grain, noise = jax.random.split(key, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    share = jax.random.uniform(soft, (len(images), 1, 1, 1))
    deviation = 0.04 * jax.random.uniform(grain, (len(images), 1, 1, 1))
    rough = images + share * (blurred - images)
    return jnp.clip(rough + deviation * jax.random.normal(noise, images.shape), 0, 1)
