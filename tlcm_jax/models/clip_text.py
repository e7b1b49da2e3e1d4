"""CLIP's text tower, with and without projection: OpenAI's CLIP-L, OpenCLIP's H and bigG."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlcm_jax.models.clip_encoder import ACTIVATIONS, CLIPEncoder
from tlcm_jax.models.layers import Dense, Dtype, layer_norm


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Architecture of a CLIP text tower; the names are transformers' own.

    Attributes:
      projection_dim: width of the pooled output; None for a tower without projection.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "CLIPTextConfig":
        """Parses a transformers `text_encoder/config.json`, or the text's part of a whole CLIP's.

        Keys that are absent or null take transformers' defaults.

        Raises:
          ValueError: the activation is not one this port implements, or a token that marks the
            begin, the end or padding lies outside the vocabulary.
        """
        if "text_config" in raw and "hidden_size" not in raw:
            raw = {**(raw["text_config"] or {}), "architectures": raw.get("architectures")}
        raw = {key: value for key, value in raw.items() if value is not None}
        activation = raw.get("hidden_act", "quick_gelu")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"text encoder config: hidden_act={activation!r} is not one of "
                f"{sorted(ACTIVATIONS)}"
            )
        vocabulary = raw.get("vocab_size", 49408)
        marks = {"eos_token_id": 49407, "bos_token_id": 0, "pad_token_id": 0}
        for name, default in marks.items():
            mark = raw.get(name, default)
            if isinstance(mark, bool) or not isinstance(mark, int) or not 0 <= mark < vocabulary:
                raise ValueError(
                    f"text encoder config: {name} = {str(mark)[:40]}: must be a token of its "
                    f"vocabulary of {vocabulary}"
                )
        projected = "CLIPTextModelWithProjection" in raw.get("architectures", ())
        return cls(
            vocab_size=vocabulary,
            hidden_size=raw.get("hidden_size", 512),
            intermediate_size=raw.get("intermediate_size", 2048),
            num_hidden_layers=raw.get("num_hidden_layers", 12),
            num_attention_heads=raw.get("num_attention_heads", 8),
            max_position_embeddings=raw.get("max_position_embeddings", 77),
            hidden_act=activation,
            layer_norm_eps=raw.get("layer_norm_eps", 1e-5),
            eos_token_id=raw.get("eos_token_id", 49407),
            projection_dim=raw.get("projection_dim", 512) if projected else None,
        )


class _Embeddings(nn.Module):
    config: CLIPTextConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        config = self.config
        initial = nn.initializers.normal(0.02)
        tokens = nn.Embed(
            config.vocab_size, config.hidden_size, embedding_init=initial, dtype=self.dtype,
            name="token_embedding",
        )  # fmt: skip
        positions = nn.Embed(
            config.max_position_embeddings, config.hidden_size, embedding_init=initial,
            dtype=self.dtype, name="position_embedding",
        )  # fmt: skip
        return tokens(input_ids) + positions(jnp.arange(input_ids.shape[1]))


class CLIPTextTransformer(nn.Module):
    """A text tower without projection: `[b, n]` ids to every state and the last after the norm."""

    config: CLIPTextConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b n"]) -> tuple[list[Array], Float[Array, "b n d"]]:
        x = _Embeddings(self.config, self.dtype, name="embeddings")(input_ids)
        causal = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        states = CLIPEncoder(self.config, self.dtype, name="encoder")(x, causal)
        last = layer_norm(self.config.layer_norm_eps, self.dtype, "final_layer_norm")(states[-1])
        return states, last


class CLIPTextModel(nn.Module):
    """CLIP text tower. Matches transformers' `CLIPTextModel` and, where the config asks for a
    projection, `CLIPTextModelWithProjection`.
    """  # noqa: D205

    config: CLIPTextConfig
    dtype: Dtype = jnp.float32

    @nn.nowrap
    def example(self) -> tuple[Array]:
        """Inputs to trace the initialisation with."""
        return (jnp.zeros((1, 8), jnp.int32),)

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, " b *tokens"]
    ) -> tuple[list[Array], Float[Array, "b m d"], Float[Array, "b p"]]:
        """Runs the tower.

        Chunks of a long prompt are encoded each on its own, as if it were a prompt, and their
        states joined along the token axis: what the community's pipelines and compel do with
        prompts over 77 tokens. The pooled output is the first chunk's.

        No position is masked but by causality: padding is encoded like text, as diffusers does it.
        So which token pads (end-of-text in CLIP-L, "!" in OpenCLIP's) is the tokenizer's to say,
        and matters.

        Args:
          input_ids: `[b, n]` token ids, n at most `max_position_embeddings`; or `[b, k, n]`, k
            chunks of each prompt (`data.tokens.tokenize`).

        Returns:
          The hidden states `[b, n, d]` (embeddings first, before the final norm), the last one
          after the final norm, and the pooled output at the end-of-text token: `[b, d]`, or
          `[b, projection_dim]` with projection. With chunks the states are `[b, k * n, d]`.

          SD 1.x and 2.x condition on the last state after the final norm (SD 2.x's tower was
          published without its last layer), SDXL on the penultimate one, `states[-2]`, before it.

        Raises:
          ValueError: the sequences are longer than the tower has positions.
        """
        config = self.config
        batch, length = input_ids.shape[0], input_ids.shape[-1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens a sequence, but this text encoder has"
                f" {config.max_position_embeddings} positions; cut longer prompts into chunks"
            )
        rows = input_ids.reshape(-1, length)
        states, last = CLIPTextTransformer(config, self.dtype, name="text_model")(rows)
        if config.eos_token_id == 2:
            # Files written before the field was right: the end-of-text token has the largest id.
            end = jnp.argmax(rows, axis=-1)
        else:
            end = jnp.argmax(rows == config.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        pooled = pooled.reshape(batch, -1, pooled.shape[-1])[:, 0]
        if config.projection_dim is not None:
            pooled = Dense(
                config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
            )(pooled)

        def join(state: Array) -> Array:
            return state.reshape(batch, -1, state.shape[-1])

        return [join(state) for state in states], join(last), pooled
