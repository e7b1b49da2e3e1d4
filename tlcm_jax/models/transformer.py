"""The UNet's spatial transformer: self-attention, cross-attention and GEGLU over latent pixels."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.attention import KEPT, attention
from tlcm_jax.models.layers import Conv, Dense, Dtype, group_norm, layer_norm


class Attention(nn.Module):
    """Multi-head attention of `x [b, n, c]` over `context [b, m, d]` (itself when None)."""

    heads: int
    head_dim: int
    use_bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], context: Float[Array, "b m e"] | None = None
    ) -> Float[Array, "b n d"]:
        context = x if context is None else context
        inner = self.heads * self.head_dim

        def project(name: str, inputs: Float[Array, "b m e"]) -> Float[Array, "b m heads k"]:
            layer = Dense(inner, use_bias=self.use_bias, dtype=self.dtype, name=name)
            return layer(inputs).reshape(*inputs.shape[:-1], self.heads, self.head_dim)

        out = attention(project("to_q", x), project("to_k", context), project("to_v", context))
        return Dense(x.shape[-1], dtype=self.dtype, name="to_out.0")(
            out.reshape(*x.shape[:-1], inner)
        )


class GEGLU(nn.Module):
    """Gated exact (erf) GELU, `[..., c] -> [..., features]`."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n out"]:
        x = Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
        hidden, gate = jnp.split(x, 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The transformer block's GEGLU feed-forward network, four times as wide inside."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n out"]:
        h = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net.0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="net.2")(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normed and residual."""

    heads: int
    head_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], context: Float[Array, "b m e"]
    ) -> Float[Array, "b n d"]:
        def attend(name: str) -> Attention:
            return Attention(self.heads, self.head_dim, dtype=self.dtype, name=name)

        x = x + attend("attn1")(layer_norm(1e-5, self.dtype, "norm1")(x))
        x = x + attend("attn2")(layer_norm(1e-5, self.dtype, "norm2")(x), context)
        feed_forward = FeedForward(dtype=self.dtype, name="ff")
        return x + feed_forward(layer_norm(1e-5, self.dtype, "norm3")(x))


def rematerialized(function: Any, remat: str, transform: Callable = jax.checkpoint) -> Any:
    """What recomputes its activations in the backward pass.

    Args:
      function: traceable, or a module's class.
      remat: `none` recomputes nothing; `attention` all but attention's results, whose kernels are
        the dearest to run again for their size; every other policy all.
      transform: `jax.checkpoint`, or `nn.remat` for a class.
    """
    if remat == "none":
        return function
    keep = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "attention" else None
    return transform(function, policy=keep)


class Transformer2DModel(nn.Module):
    """A stack of transformer blocks over the pixels of `x [b, h, w, c]`.

    Attributes:
      linear_projection: SDXL and SD 2.x project with linear layers, SD 1.x with 1x1 convolutions.
      remat: of each block (`rematerialized`).
    """

    layers: int
    heads: int
    head_dim: int
    groups: int = 32
    linear_projection: bool = True
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b m e"]
    ) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        inner = self.heads * self.head_dim
        block = rematerialized(BasicTransformerBlock, self.remat, nn.remat)

        def project(
            name: str, features: int, inputs: Float[Array, " b *place c"]
        ) -> Float[Array, " b *place out"]:
            if self.linear_projection:
                return Dense(features, dtype=self.dtype, name=name)(inputs)
            return Conv(features, kernel_size=1, padding=0, dtype=self.dtype, name=name)(inputs)

        h = group_norm(self.groups, 1e-6, self.dtype, "norm")(x)
        h = project("proj_in", inner, h).reshape(batch, height * width, inner)
        for i in range(self.layers):
            h = block(self.heads, self.head_dim, self.dtype, name=f"transformer_blocks.{i}")(
                h, context
            )
        return x + project("proj_out", channels, h.reshape(batch, height, width, inner))
