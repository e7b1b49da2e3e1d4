"""Residual block and resampling layers shared by the UNet and the autoencoder."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Conv, Dense, Dtype, group_norm, upsample_nearest


class ResnetBlock2D(nn.Module):
    """Pre-activation residual block, conditioned on a time embedding when one is given.

    Matches diffusers' `ResnetBlock2D` (SiLU, no resampling, default time-embedding norm).
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time_embedding: Float[Array, "b d"] | None = None,
    ) -> Float[Array, "b h w out"]:
        h = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, "norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        if time_embedding is not None:
            projection = Dense(self.features, dtype=self.dtype, name="time_emb_proj")
            h = h + projection(nn.silu(time_embedding))[:, None, None, :]
        h = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, "norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(
                self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut"
            )(x)
        return x + h


class Downsample2D(nn.Module):
    """Strided 3x3 convolution, halving height and width (rounding up).

    Attributes:
      padding: 1 in the UNet; 0 in the autoencoder's encoder, which pads the far edges only.
    """

    features: int
    padding: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b half_h half_w out"]:
        padding = self.padding if self.padding else ((0, 1), (0, 1))
        return Conv(self.features, strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling (to twice the size, or to `size`) and a 3x3 convolution."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b up_h up_w out"]:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        x = upsample_nearest(x, height, width)
        return Conv(self.features, dtype=self.dtype, name="conv")(x)
