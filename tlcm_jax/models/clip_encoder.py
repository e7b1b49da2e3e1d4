"""The transformer that both of CLIP's towers are: pre-norm attention and a two-layer MLP.

    h = x + attend(norm1(x)),    y = h + W2 a(W1 norm2(h)),      a = GELU, or x sigmoid(1.702 x)

Named as in transformers' `CLIPEncoder` (Radford et al., arXiv 2103.00020).
"""

from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from tlcm_jax.models.attention import attention
from tlcm_jax.models.layers import Dense, Dtype, layer_norm

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@runtime_checkable
class TowerConfig(Protocol):
    """What a tower's config says of its transformer; the names are transformers' own."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102
    @property
    def num_hidden_layers(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def hidden_act(self) -> str: ...  # noqa: D102
    @property
    def layer_norm_eps(self) -> float: ...  # noqa: D102


class CLIPEncoder(nn.Module):
    """The layers of a tower; every state is returned, the input first."""

    config: TowerConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "1 1 n n"] | None = None
    ) -> list[Float[Array, "b n d"]]:
        states = [x]
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, self.dtype, name=f"layers.{i}")(x, mask)
            states.append(x)
        return states


class _Layer(nn.Module):
    config: TowerConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        epsilon = self.config.layer_norm_eps
        attend = _SelfAttention(self.config.num_attention_heads, self.dtype, name="self_attn")
        x = x + attend(layer_norm(epsilon, self.dtype, "layer_norm1")(x), mask)
        mlp = _MLP(self.config, self.dtype, name="mlp")
        return x + mlp(layer_norm(epsilon, self.dtype, "layer_norm2")(x))


class _SelfAttention(nn.Module):
    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        width = x.shape[-1]

        def project(name: str) -> Array:
            y = Dense(width, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], self.heads, width // self.heads)

        out = attention(project("q_proj"), project("k_proj"), project("v_proj"), mask)
        return Dense(width, dtype=self.dtype, name="out_proj")(out.reshape(x.shape))


class _MLP(nn.Module):
    config: TowerConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        h = ACTIVATIONS[self.config.hidden_act](h)
        return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(h)
