"""Timestep embeddings of the UNet."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.models.layers import Dense, Dtype


def sinusoidal(
    timesteps: Num[Array, " b"],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
) -> Float[Array, "b d"]:
    """Sinusoidal embedding `[n] -> [n, dim]`, fp32.

    Matches diffusers' `get_timestep_embedding` with `max_period=10000`.
    """
    half = dim // 2
    exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]
    parts = (
        (jnp.cos(angles), jnp.sin(angles))
        if flip_sin_to_cos
        else (jnp.sin(angles), jnp.cos(angles))
    )
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def guidance_embedding(scale: Float[Array, " b"], dim: int) -> Float[Array, "b d"]:
    """The `timestep_cond` of LCM-style networks, `[b] -> [b, dim]`, fp32.

    Matches diffusers' `get_guidance_scale_embedding(scale - 1, dim)`, as its pipelines call it
    (Luo et al. 2023, arXiv 2310.04378).

    Args:
      scale: guidance scale w; 1 is the conditional model itself.
      dim: the network's `time_cond_proj_dim`.
    """
    return sinusoidal(1000.0 * (scale - 1.0), dim, flip_sin_to_cos=False, freq_shift=1.0)


class TimestepEmbedding(nn.Module):
    """Two-layer SiLU network on an embedding, `[b, in] -> [b, features]`."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b d"], condition: Float[Array, "b g"] | None = None
    ) -> Float[Array, "b out"]:
        if condition is not None:  # LCM-style guidance embedding: `time_cond_proj_dim`
            projected = Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")
            x = x + projected(condition)
        x = Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))
