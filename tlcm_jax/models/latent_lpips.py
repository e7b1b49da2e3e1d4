"""Latent LPIPS: how different two latents look, by a VGG16 that reads latents.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) on latents (Kang et al. 2024, arXiv 2405.05967): VGG16
with 4 input channels, and without its first three max-pools, for the latents are that much smaller
already. With f_l the features of stage l, scaled to unit length at each place, and w_l >= 0,

    d(a, b) = sum_l mean_{h, w} sum_c w_lc (f_l(a) - f_l(b))_hwc^2.              (1)
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Conv, Dense, Dtype, StoredBatchNorm

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
    def __call__(self, x: Float[Array, "b h w c"]) -> list[Array]:
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
    def __call__(
        self, a: Float[Array, "n h w c"], b: Float[Array, "n h w c"]
    ) -> Float[Array, " n"]:
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


class ELatentLPIPS(nn.Module):
    """Equation (1) as the published E-LatentLPIPS has it: `[b, h, w, c]` twice to `[b]`, fp32.

    Its VGG16 has batch norms, by stored statistics, and its last two stages are read after their
    max-pools. This is the distance itself: neither the random augmentations that the published
    loss averages over (the E), nor the mean absolute difference that it adds.

    Attributes:
      widths: channels of the five stages.
    """

    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(
        self, a: Float[Array, "n h w c"], b: Float[Array, "n h w c"]
    ) -> Float[Array, " n"]:
        both = jnp.stack([a, b], axis=1)
        x, layer = both.reshape(-1, *a.shape[1:]), 0
        total = jnp.zeros(a.shape[0])
        for stage, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True)):
            for _ in range(depth):
                name = f"net.slice{stage + 1}"
                x = Conv(width, name=f"{name}.{layer}")(x)
                x = nn.relu(StoredBatchNorm(1e-5, name=f"{name}.{layer + 1}")(x))
                layer += 3  # a convolution, a norm, a ReLU
            if stage >= 3 and min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            layer += 1  # the max-pool, taken out of the first three stages
            unit = unit_length(x, 1e-8).reshape(*both.shape[:2], *x.shape[1:])
            squares = jnp.square(unit[:, 0] - unit[:, 1])
            weighted = Dense(1, use_bias=False, name=f"lin{stage}.model.1")(squares)
            total = total + jnp.mean(weighted, axis=(1, 2, 3))
        return total


def channels_of(params: Any) -> int:
    """Channels of the latents that parameters of a latent LPIPS, ours or published, are for."""
    first = params["net"]["conv1_1"] if "net" in params else params["net.slice1.0"]
    return first["kernel"].shape[2]


def unit_length(x: Float[Array, " *place c"], epsilon: float = 1e-10) -> Float[Array, " *place c"]:
    """Features `[..., c]` over their length; where they are all 0, 0."""
    # The root of a sum that may be 0 has no gradient there.
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x / length
