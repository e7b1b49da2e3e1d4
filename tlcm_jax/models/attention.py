"""The one door to attention: every network calls `attention`, and only this file picks a kernel."""

import jax
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b m heads d"],
    value: Float[Array, "b m heads d"],
    mask: Bool[Array, "#b #heads #n m"] | None = None,
) -> Float[Array, "b n heads d"]:
    """Scaled dot-product attention with an fp32 softmax.

    Args:
      query: `[b, n, heads, d]`.
      key: `[b, m, heads, d]`.
      value: `[b, m, heads, d]`.
      mask: boolean, broadcastable to `[b, heads, n, m]`; True where attention is allowed.

    Returns:
      `[b, n, heads, d]`, in the query's dtype.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
