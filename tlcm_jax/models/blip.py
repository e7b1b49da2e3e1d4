"""BLIP as ImageReward uses it: a ViT, and a BERT whose layers also attend to the ViT's tokens.

    image tokens  v = norm(blocks([class, patches] + positions)),    pre-norm, GELU              (1)
    text          h = bert(words; v): in each layer self-attention over the words, then over v,
                  then a feed-forward, each followed by a norm of its sum with what went in      (2)

(Li et al., arXiv 2201.12086; Xu et al., arXiv 2304.05977.) Names are the published checkpoint's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tlcm_jax.models.aesthetic import LinearChain
from tlcm_jax.models.attention import attention
from tlcm_jax.models.layers import Conv, Dense, layer_norm

_VIT_EPSILON, _BERT_EPSILON = 1e-6, 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class BLIPConfig:
    """Sizes; ImageReward-v1.0's by default. Heads are 64 wide in both networks."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vocab_size: int = 30524
    positions: int = 512
    text_width: int = 768
    text_inner: int = 3072
    text_layers: int = 12


class ImageRewardModel(nn.Module):
    """Normalised pictures and texts to raw rewards `[b]`, from the text's first token."""

    config: BLIPConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b s s 3"], ids: Int[Array, "b n"], seen: Bool[Array, "b n"]
    ) -> Float[Array, " b"]:
        tokens = _ViT(self.config, name="blip.visual_encoder")(pixels)
        words = _Bert(self.config, name="blip.text_encoder")(ids, seen, tokens)
        return LinearChain(name="mlp")(words[:, 0])


class _ViT(nn.Module):
    """Equation (1)."""

    config: BLIPConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b n d"]:
        config, width = self.config, self.config.vision_width
        patches = Conv(
            width, config.patch_size, strides=config.patch_size, padding=0, name="patch_embed.proj"
        )(pixels)
        patches = patches.reshape(len(pixels), -1, width)
        normal = nn.initializers.normal(0.02)
        first = self.param("cls_token", normal, (1, 1, width))
        count = 1 + (config.image_size // config.patch_size) ** 2
        positions = self.param("pos_embed", normal, (1, count, width))
        first = jnp.broadcast_to(first, (len(pixels), 1, width))
        x = jnp.concatenate([first, patches], axis=1) + positions
        for i in range(config.vision_layers):
            x = _ViTBlock(name=f"blocks.{i}")(x)
        return layer_norm(_VIT_EPSILON, jnp.float32, "norm")(x)


class _ViTBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        h = layer_norm(_VIT_EPSILON, jnp.float32, "norm1")(x)
        q, k, v = jnp.split(Dense(3 * width, name="attn.qkv")(h), 3, axis=-1)
        x = x + Dense(width, name="attn.proj")(_attend(q, k, v))
        h = layer_norm(_VIT_EPSILON, jnp.float32, "norm2")(x)
        h = jax.nn.gelu(Dense(4 * width, name="mlp.fc1")(h), approximate=False)
        return x + Dense(width, name="mlp.fc2")(h)


class _Bert(nn.Module):
    """Equation (2)."""

    config: BLIPConfig

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b n"], seen: Bool[Array, "b n"], tokens: Float[Array, "b m d"]
    ) -> Float[Array, "b n e"]:
        config = self.config

        def table(rows: int, name: str) -> nn.Embed:
            normal = nn.initializers.normal(0.02)
            return nn.Embed(rows, config.text_width, embedding_init=normal, name=name)

        words = table(config.vocab_size, "embeddings.word_embeddings")(ids)
        positions = table(config.positions, "embeddings.position_embeddings")
        x = words + positions(jnp.arange(ids.shape[1]))
        x = layer_norm(_BERT_EPSILON, jnp.float32, "embeddings.LayerNorm")(x)
        for i in range(config.text_layers):
            x = _BertLayer(config, name=f"encoder.layer.{i}")(x, seen[:, None, None], tokens)
        return x


class _BertLayer(nn.Module):
    config: BLIPConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, tokens: Array) -> Array:
        x = self._attention("attention", x, x, mask)
        x = self._attention("crossattention", x, tokens, None)
        h = Dense(self.config.text_inner, name="intermediate.dense")(x)
        h = Dense(x.shape[-1], name="output.dense")(jax.nn.gelu(h, approximate=False))
        return layer_norm(_BERT_EPSILON, jnp.float32, "output.LayerNorm")(h + x)

    def _attention(self, name: str, x: Array, context: Array, mask: Array | None) -> Array:
        width = x.shape[-1]
        q = Dense(width, name=f"{name}.self.query")(x)
        k = Dense(width, name=f"{name}.self.key")(context)
        v = Dense(width, name=f"{name}.self.value")(context)
        out = Dense(width, name=f"{name}.output.dense")(_attend(q, k, v, mask))
        return layer_norm(_BERT_EPSILON, jnp.float32, f"{name}.output.LayerNorm")(out + x)


def _attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attention of heads 64 wide, `[b, n, d]` and `[b, m, d]` to `[b, n, d]`."""
    q4, k4, v4 = (x.reshape(*x.shape[:-1], x.shape[-1] // 64, 64) for x in (q, k, v))
    return attention(q4, k4, v4, mask).reshape(q.shape)
