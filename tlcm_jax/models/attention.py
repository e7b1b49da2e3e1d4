"""The one door to attention: every network calls `attention`, and only this file picks a kernel.

The choice is between programs for the platform that is compiled for, whatever the host:

* TPU, bf16, long self-attention: splash (`splash.py`);
* CUDA, bf16, long self-attention: cuDNN's;
* all else (short sequences such as a prompt's 77 tokens, masks, fp32, CPUs): XLA's own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from tlcm_jax.models import splash

# Tokens from which on the logits, and their way to memory and back, cost more than a kernel of
# their own: 512 px at SDXL's middle level, and all that is larger.
_LONG = 1024
# The widest heads that the kernels take: of splash as one tile's working set still fits, of cuDNN
# before Hopper.
_WIDEST = 128
# What a rematerialisation policy knows the results of attention by.
KEPT = splash.KEPT


def attention(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b m heads d"],
    value: Float[Array, "b m heads d"],
    mask: Bool[Array, "#b #heads #n m"] | None = None,
) -> Float[Array, "b n heads d"]:
    """Scaled dot-product attention with an fp32 softmax.

    On several TPUs splash must know how the batch is cut: trace the caller in the context of an
    abstract mesh (`training.mesh.known_mesh`). Without one there is one device.

    Args:
      query: `[b, n, heads, d]`.
      key: `[b, m, heads, d]`.
      value: `[b, m, heads, d]`.
      mask: boolean, broadcastable to `[b, heads, n, m]`; True where attention is allowed.

    Returns:
      `[b, n, heads, d]`, in the query's dtype.
    """
    xla = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
    batch, length, _, width = query.shape
    long = mask is None and query.shape == key.shape and length >= _LONG and width <= _WIDEST
    if not long or query.dtype != jnp.bfloat16:
        return checkpoint_name(xla(query, key, value), KEPT)
    kernels: dict[str, Callable[..., Array]] = {}
    ways = max(jax.sharding.get_abstract_mesh().size, 1)  # 0 where there is no mesh
    if splash.tiles_of(length) and batch % ways == 0:
        kernels["tpu"] = splash.attend
    if width % 8 == 0 and _has_cudnn():
        kernels["cuda"] = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    out = jax.lax.platform_dependent(query, key, value, **kernels, default=xla)
    return checkpoint_name(out, KEPT)


@functools.cache
def _has_cudnn() -> bool:
    """Whether cuDNN is here: without it its kernel cannot even be traced."""
    return any(device.platform == "gpu" for device in jax.devices())
