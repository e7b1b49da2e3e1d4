"""PEA-Diffusion's adapter: another text encoder's states in the place of SDXL's own.

Of states x `[b, n, d]` of a frozen text encoder (Ma et al. 2023, arXiv 2311.17086),

    h = W3 gelu(W2 gelu(W1 norm(x))),       widths d, 2048, 2048, p,              (1)
    pooled = mean over tokens of h,         sequence = V gelu(h) + v,             (2)

p = 1280 and a sequence 2048 wide for SDXL. W have no bias. Names are the published weights' own.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Dense, Dtype, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextAdapterConfig:
    """Widths: of the encoder's states, inside, of the pooled output and of the sequence."""

    in_width: int
    hidden_width: int = 2048
    pooled_width: int = 1280
    sequence_width: int = 2048


class TextAdapter(nn.Module):
    """Equations (1) and (2)."""

    config: TextAdapterConfig
    dtype: Dtype = jnp.float32

    @nn.nowrap
    def example(self) -> tuple[Array]:
        """Inputs to trace the initialisation with."""
        return (jnp.zeros((1, 2, self.config.in_width)),)

    @nn.compact
    def __call__(
        self, states: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n s"], Float[Array, "b p"]]:
        """The sequence and the pooled output that SDXL's UNet is conditioned on."""
        config = self.config
        h = layer_norm(1e-5, self.dtype, "layernorm")(states)
        for i, width in enumerate((config.hidden_width, config.hidden_width, config.pooled_width)):
            h = jax.nn.gelu(h, approximate=False) if i else h
            name = f"projector.{2 * i}"
            h = Dense(width, use_bias=False, dtype=self.dtype, name=name)(h)
        fc = Dense(config.sequence_width, dtype=self.dtype, name="fc")
        pooled = jnp.mean(h.astype(jnp.float32), axis=1)
        return fc(jax.nn.gelu(h, approximate=False)), pooled
