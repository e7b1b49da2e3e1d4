"""Which blocks are compiled in the place of others."""

import jax
import jax.numpy as jnp

from tlcm_jax.models.layers import Conv, Dense
from tlcm_jax.planning.blocks import Block, representatives


def block(module, *shape, calls=1):
    inputs = (jax.ShapeDtypeStruct((1, *shape), jnp.float32),)
    name = f"{type(module).__name__}_{shape}"
    return Block(name=name, module=module, inputs=inputs, calls=calls, remat="none")


def test_one_of_each_kind_stands_for_the_others():
    blocks = [
        block(Conv(4), 8, 8, 4),
        block(Conv(4), 8, 8, 8),
        block(Conv(4), 4, 4, 16),
        block(Dense(4), 8, 8, 4),
        block(Dense(8), 4, 4, 4, calls=3),
    ]
    seconds = dict(zip([b.name for b in blocks], (20, 30, 40, 1, 0.5), strict=True))
    chosen = representatives(blocks, lambda b: seconds[b.name], least=0.05)
    # Convolutions of a size together; the dense layers take little, so all of them together.
    assert [blocks.index(each) for each in chosen] == [1, 1, 2, 4, 4]
    assert representatives(blocks[:1], lambda b: 1.0) == blocks[:1]
