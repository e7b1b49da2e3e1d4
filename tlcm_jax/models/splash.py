"""Self-attention of a long sequence on a TPU: JAX's splash kernel (Pallas), over every key.

    out = softmax(q k^T / sqrt(d)) v,                                            (1)

in tiles whose logits never leave the chip's vector memory, forward (Dao et al. 2022, arXiv
2205.14135) and backward; the backward pass makes all three gradients in one kernel. Heads of 64
are taken as they are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


class Tiles(NamedTuple):
    """Sides of the tiles that the kernel works through, in both passes.

    Attributes:
      queries: of a tile.
      keys: of a tile, as they are brought from memory.
      keys_at_once: of those, as they are multiplied.
    """

    queries: int
    keys: int
    keys_at_once: int


# The fastest of those tried by the compiler's schedule for a v5e (`benchmarks/attention_tiles.py`):
# 4096 tokens in 10 heads take 0.52 ms forward and 1.08 back, with (512, 512, 512) 0.84 and 1.31.
TILES = Tiles(1024, 2048, 1024)
# Of the kernel's results that its backward pass reads, for rematerialisation policies.
KEPT = "attention"
# The smallest tile the kernel takes: a register's lanes.
_LANES = 128


def tiles_of(length: int) -> Tiles | None:
    """The largest tiles that divide a sequence, at most `TILES`; None where there are none."""

    def largest(limit: int) -> int:
        return next((t for t in range(limit, 0, -_LANES) if length % t == 0), 0)

    tiles = Tiles(*map(largest, TILES))
    return tiles if all(tiles) and tiles.keys % tiles.keys_at_once == 0 else None


def attend(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b n heads d"],
    value: Float[Array, "b n heads d"],
    interpret: bool = False,
) -> Float[Array, "b n heads d"]:
    """Equation (1), its sums in fp32.

    Under an abstract mesh (`jax.sharding.use_abstract_mesh`) each device runs the kernel on its
    own part of the batch, which all axes of the mesh cut: the compiler cannot cut a kernel itself.

    Args:
      query: of a length that `tiles_of` has tiles for, and a batch that the mesh divides.
      key: of the same shape.
      value: of the same shape.
      interpret: run on any platform, slowly, by the kernel's own interpreter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local: Any = functools.partial(_attend, interpret)
    if mesh.size > 1:
        batch = P(mesh.axis_names)
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(batch,) * 3, out_specs=batch, check_vma=False
        )
    return local(query, key, value)


def _attend(interpret: bool, query: Array, key: Array, value: Array) -> Array:
    _, length, heads, width = query.shape
    kernel = _kernel(length, heads, interpret)
    # 1 / sqrt(64) is a power of two: nothing is rounded.
    q, k, v = (
        jnp.swapaxes(x, 1, 2) for x in (query * jnp.asarray(width**-0.5, query.dtype), key, value)
    )
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)


@functools.lru_cache(maxsize=32)
def _kernel(length: int, heads: int, interpret: bool) -> Any:
    tiles = tiles_of(length)
    assert tiles is not None
    sizes = splash_attention.BlockSizes(
        block_q=tiles.queries,
        block_kv=tiles.keys,
        block_kv_compute=tiles.keys_at_once,
        block_q_dkv=tiles.queries,
        block_kv_dkv=tiles.keys,
        block_kv_dkv_compute=tiles.keys_at_once,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length, length))] * heads)
    # Built while a caller is traced, and kept for the next.
    with jax.ensure_compile_time_eval():
        return splash_attention.make_splash_mha_single_device(
            mask, block_sizes=sizes, residual_checkpoint_name=KEPT, interpret=interpret
        )
