"""Chinese-CLIP's text tower, a BERT (Yang et al., arXiv 2211.01335; Devlin et al., 1810.04805).

    h = norm(x + attend(x)),    y = norm(h + W2 gelu(W1 h)),                     (1)

from norm(words + positions + types), over the tokens that are no padding. Names are those of
transformers' `ChineseCLIPTextModel`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tlcm_jax.models.attention import attention
from tlcm_jax.models.layers import Dense, Dtype, layer_norm

# Fields whose only supported value is the one given.
_ONLY = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
_MOST_LAYERS = 200


@dataclasses.dataclass(frozen=True)
class ChineseCLIPTextConfig:
    """Architecture of the text tower; the names are transformers' own."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_hidden_layers <= _MOST_LAYERS:
            raise ValueError(f"text config: num_hidden_layers = {self.num_hidden_layers}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text config: hidden_size = {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ChineseCLIPTextConfig":
        """Parses a `config.json` of Chinese-CLIP's, whole or of its text alone.

        Absent keys take transformers' defaults.

        Raises:
          ValueError: another model's config, or a field asks for what is not implemented.
        """
        kind = raw.get("model_type", "chinese_clip_text_model")
        if not str(kind).startswith("chinese_clip"):
            raise ValueError(f"text config: model_type={kind!r} is not Chinese-CLIP's")
        raw = raw.get("text_config") or raw
        raw = {key: value for key, value in raw.items() if value is not None}
        for name, value in _ONLY.items():
            if raw.get(name, value) != value:
                raise ValueError(
                    f"text config: {name}={raw[name]!r} is not supported (only {value!r})"
                )
        return cls(
            vocab_size=raw.get("vocab_size", 30522),
            hidden_size=raw.get("hidden_size", 768),
            intermediate_size=raw.get("intermediate_size", 3072),
            num_hidden_layers=raw.get("num_hidden_layers", 12),
            num_attention_heads=raw.get("num_attention_heads", 12),
            max_position_embeddings=raw.get("max_position_embeddings", 512),
            type_vocab_size=raw.get("type_vocab_size", 2),
            layer_norm_eps=raw.get("layer_norm_eps", 1e-12),
            pad_token_id=raw.get("pad_token_id", 0),
        )


class ChineseCLIPTextModel(nn.Module):
    """Token ids to the last layer's states."""

    config: ChineseCLIPTextConfig
    dtype: Dtype = jnp.float32

    @nn.nowrap
    def example(self) -> tuple[Array]:
        """Inputs to trace the initialisation with."""
        return (jnp.zeros((1, 8), jnp.int32),)

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Runs the tower.

        Args:
          input_ids: `[b, n]`, padded with the config's `pad_token_id`, which nothing attends to.

        Raises:
          ValueError: the sequences are longer than the tower has positions.
        """
        config, length = self.config, input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens a sequence, but this text encoder has "
                f"{config.max_position_embeddings} positions"
            )

        def table(rows: int, name: str) -> nn.Embed:
            normal = nn.initializers.normal(0.02)
            return nn.Embed(
                rows, config.hidden_size, embedding_init=normal, dtype=self.dtype,
                name=f"embeddings.{name}",
            )  # fmt: skip

        words = table(config.vocab_size, "word_embeddings")(input_ids)
        positions = table(config.max_position_embeddings, "position_embeddings")
        types = table(config.type_vocab_size, "token_type_embeddings")
        x = words + positions(jnp.arange(length)) + types(jnp.zeros((1,), jnp.int32))
        x = layer_norm(config.layer_norm_eps, self.dtype, "embeddings.LayerNorm")(x)
        seen = (input_ids != config.pad_token_id)[:, None, None]
        for i in range(config.num_hidden_layers):
            x = _Layer(config, self.dtype, name=f"encoder.layer.{i}")(x, seen)
        return x


class _Layer(nn.Module):
    """Equation (1)."""

    config: ChineseCLIPTextConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], seen: Bool[Array, "b 1 1 n"]
    ) -> Float[Array, "b n d"]:
        config, width = self.config, x.shape[-1]
        heads = config.num_attention_heads

        def project(name: str) -> Array:
            y = Dense(width, dtype=self.dtype, name=f"attention.self.{name}")(x)
            return y.reshape(*x.shape[:-1], heads, width // heads)

        def joined(name: str, states: Array, before: Array) -> Array:
            states = Dense(width, dtype=self.dtype, name=f"{name}.dense")(states)
            norm = layer_norm(config.layer_norm_eps, self.dtype, f"{name}.LayerNorm")
            return norm(states + before)

        out = attention(project("query"), project("key"), project("value"), seen)
        h = joined("attention.output", out.reshape(x.shape), x)
        inner = Dense(config.intermediate_size, dtype=self.dtype, name="intermediate.dense")(h)
        return joined("output", jax.nn.gelu(inner, approximate=False), h)
