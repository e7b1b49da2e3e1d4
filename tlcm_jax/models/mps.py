"""MPS's network: an image's tokens attend to those words of its text that a condition is about.

With t_i the tokens of the text, c_j those of the condition ("light, color, clarity, ...") and v the
image's, all by CLIP and projected into its space (Zhang et al., arXiv 2405.14705):

    m_i = max_j t_i c_j,   word i is seen if m_i / max_k m_k > 0.01                            (1)
    h   = the class token of cross(v; t, seen)                                                 (2)
    s   = exp(logit_scale) cos(t_end, h)                                                       (3)

The published code divides by the maximum over the *batch* in (1), so that a score depends on what
else is in it. Here k runs over the text's own words: what the published code does at batch 1.

The cross model has four layers of two residual blocks, both with a feed-forward beside the
attention and keys and values of one head for all (Shazeer, arXiv 1911.02150); the second attends
to the image's own tokens with rotary positions (Su et al., arXiv 2104.09864).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tlcm_jax.models.clip import CLIPConfig, CLIPModel, unit
from tlcm_jax.models.layers import Dense

_SEEN = 0.01
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossConfig:
    """Sizes of the cross model; the published ones by default."""

    layers: int = 4
    heads: int = 16
    head_width: int = 64
    expansion: int = 4


class MPSModel(nn.Module):
    """Equations (1) to (3): normalised pictures, texts' ids and the condition's to scores `[b]`."""

    config: CLIPConfig
    cross: CrossConfig = CrossConfig()

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b s s 3"], ids: Int[Array, "b n"], condition: Int[Array, "1 m"]
    ) -> Float[Array, " b"]:
        clip = CLIPModel(self.config, name="model")
        words, end = clip.text_tokens(ids)
        about, _ = clip.text_tokens(condition)
        match = jnp.max(jnp.einsum("bid,jd->bij", words, about[0]), axis=-1)
        seen = match / jnp.max(match, axis=-1, keepdims=True) > _SEEN  # (1)
        tokens = _CrossModel(self.cross, name="cross_model")(
            clip.image_tokens(pixels), words, seen
        )  # (2)
        cosine = jnp.sum(unit(end) * unit(tokens[:, 0]), axis=-1)
        return jnp.exp(clip.logit_scale) * cosine  # (3)


class _CrossModel(nn.Module):
    config: CrossConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], context: Float[Array, "b m d"], seen: Bool[Array, "b m"]
    ) -> Float[Array, "b n d"]:
        for i in range(self.config.layers):
            x = x + _CrossAttention(self.config, name=f"layers.{i}.0.fn")(x, context, seen)
            x = x + _ParallelBlock(self.config, name=f"layers.{i}.1.fn")(x)
        return x


class _CrossAttention(nn.Module):
    config: CrossConfig

    @nn.compact
    def __call__(self, x: Array, context: Array, seen: Array) -> Array:
        config, width = self.config, x.shape[-1]
        x = _norm(x)
        q = _linear(config.heads * config.head_width, "to_q")(x)
        k, v = jnp.split(_linear(2 * config.head_width, "to_kv")(context), 2, axis=-1)
        out = _attend(q, k, v, config, seen[:, None, None])
        inner = _swiglu(_linear(2 * config.expansion * width, "ff.0")(x))
        return _linear(width, "to_out")(out) + _linear(width, "ff.2")(inner)


class _ParallelBlock(nn.Module):
    config: CrossConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, width = self.config, x.shape[-1]
        inner, head = config.heads * config.head_width, config.head_width
        x = _norm(x)
        fused = _linear(inner + 2 * head + 2 * config.expansion * width, "fused_attn_ff_proj")(x)
        q, k, v, ff = jnp.split(fused, [inner, inner + head, inner + 2 * head], axis=-1)
        q = q.reshape(*q.shape[:-1], config.heads, head)
        q, k = _rotated(q, axis=1), _rotated(k, axis=1)
        out = _attend(q.reshape(*q.shape[:2], inner), k, v, config, None)
        return _linear(width, "attn_out")(out) + _linear(width, "ff_out.1")(_swiglu(ff))


def _attend(
    q: Float[Array, "b n hd"],
    k: Float[Array, "b m d"],
    v: Float[Array, "b m d"],
    config: CrossConfig,
    mask: Bool[Array, "b 1 1 m"] | None,
) -> Float[Array, "b n hd"]:
    """Attention of many heads to the one head of keys and values."""
    q = q.reshape(*q.shape[:-1], config.heads, config.head_width)
    out = jax.nn.dot_product_attention(q, k[:, :, None], v[:, :, None], mask=mask)
    return out.reshape(*out.shape[:2], -1)


def _rotated(x: Array, axis: int) -> Array:
    """Rotary positions along an axis, the last axis's halves turned against each other."""
    half = x.shape[-1] // 2
    turns = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[axis])[:, None] * turns
    angles = angles.reshape(x.shape[axis], *(1,) * (x.ndim - axis - 2), half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _swiglu(x: Array) -> Array:
    value, gate = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def _linear(features: int, name: str) -> Dense:
    return Dense(features, use_bias=False, name=name)


def _norm(x: Array) -> Array:
    return nn.LayerNorm(epsilon=_EPSILON, use_bias=False, use_fast_variance=False, name="norm")(x)
