"""Latent LPIPS: how different two latents look, by a VGG16 that reads latents.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) on latents (Kang et al. 2024, arXiv 2405.05967): VGG16
with 4 input channels, and without its first three max-pools, for the latents are that much smaller
already. With f_l the features of stage l, scaled to unit length at each place, and w_l >= 0,

    d(a, b) = sum_l mean_{h, w} sum_c w_lc (f_l(a) - f_l(b))_hwc^2.              (1)
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tlcm_jax.models.layers import Conv, Dtype

# VGG16: convolutions of each stage, and their channels.
DEPTHS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)


class LatentVGG(nn.Module):
    """The features of `[b, h, w, c]` latents at the end of each stage, after the ReLU.

    Attributes:
      widths: channels of the five stages. VGG16's, or narrower ones for a small world.
    """

    widths: tuple[int, ...] = WIDTHS
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        stages = []
        for stage, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True)):
            if stage == 4 and min(x.shape[1:3]) > 1:  # the one max-pool that is left
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(depth):
                x = nn.relu(Conv(width, dtype=self.dtype, name=f"conv{stage + 1}_{i + 1}")(x))
            stages.append(x)
        return stages


class LatentLPIPS(nn.Module):
    """Equation (1): `[b, h, w, c]` twice to `[b]`, fp32; 0 for equal latents."""

    widths: tuple[int, ...] = WIDTHS
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        network = LatentVGG(self.widths, self.dtype, name="net")
        # One call, side by side, so that a sharded batch stays where it is.
        both = jnp.stack([a, b], axis=1)
        total = jnp.zeros(a.shape[0])
        for i, maps in enumerate(network(both.reshape(-1, *a.shape[1:]))):
            unit = unit_length(maps.astype(jnp.float32)).reshape(*both.shape[:2], *maps.shape[1:])
            weight = self.param(f"lin{i}", nn.initializers.ones_init(), maps.shape[-1:])
            # The weight's size is the weight: it cannot become negative, whatever a step does.
            squares = jnp.abs(weight) * jnp.square(unit[:, 0] - unit[:, 1])
            total = total + jnp.mean(jnp.sum(squares, axis=-1), axis=(1, 2))
        return total


def channels_of(params: Any) -> int:
    """Channels of the latents that parameters of `LatentLPIPS` are for."""
    return params["net"]["conv1_1"]["kernel"].shape[2]


def unit_length(x: Array) -> Array:
    """Features `[..., c]` over their length; where they are all 0, 0."""
    # The root of a sum that may be 0 has no gradient there.
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)
    return x / length
