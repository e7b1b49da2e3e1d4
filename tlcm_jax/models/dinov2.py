"""DINOv2's ViT, whose class token Frechet distances compare (arXiv 2304.07193, 2306.04675).

    h = x + l1 attend(norm1(x)),    y = h + l2 W2 gelu(W1 norm2(h)),    l: a scale a channel

The positions were learnt for 518 pixels; those of another size are interpolated, as PyTorch's
bicubic does it (a = -0.75, no antialiasing). Names are transformers' `Dinov2Model`'s.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlcm_jax.models.attention import attention
from tlcm_jax.models.layers import Conv, Dense, layer_norm

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Sizes; ViT-L/14's by default. Heads are 64 wide.

    Attributes:
      trained_grid: patches a side for which the positions were learnt.
      offset: added to the side before it is divided by the trained one: 0.1 in the authors' code,
        0 in transformers.
    """

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    patch_size: int = 14
    trained_grid: int = 37
    offset: float = 0.1


class DINOv2(nn.Module):
    """Normalised images to the class token after the last norm."""

    config: DINOv2Config

    @nn.compact
    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        x = _Embeddings(self.config, name="embeddings")(pixels)
        for i in range(self.config.num_hidden_layers):
            x = _Layer(name=f"encoder.layer.{i}")(x)
        return layer_norm(_EPSILON, jnp.float32, "layernorm")(x[:, 0])


class _Embeddings(nn.Module):
    config: DINOv2Config

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        config, width = self.config, self.config.hidden_size
        patches = Conv(
            width, config.patch_size, strides=config.patch_size, padding=0,
            name="patch_embeddings.projection",
        )(pixels)  # fmt: skip
        side = patches.shape[1]
        normal = nn.initializers.normal(0.02)
        trained = config.trained_grid
        positions = self.param("position_embeddings", normal, (1, 1 + trained**2, width))
        first = self.param("cls_token", normal, (1, 1, width)) + positions[:, :1]
        grid = positions[0, 1:].reshape(trained, trained, width)
        if side != trained:
            weights = jnp.asarray(bicubic_weights(trained, side, config.offset), jnp.float32)
            grid = jnp.einsum("ih,jw,hwd->ijd", weights, weights, grid, precision="highest")
        patches = (patches + grid).reshape(len(pixels), side**2, width)
        return jnp.concatenate([jnp.broadcast_to(first, (len(pixels), 1, width)), patches], axis=1)


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        ones = nn.initializers.ones_init()
        h = layer_norm(_EPSILON, jnp.float32, "norm1")(x)
        q, k, v = (
            Dense(width, name=f"attention.attention.{each}")(h).reshape(*h.shape[:-1], -1, 64)
            for each in ("query", "key", "value")
        )
        h = Dense(width, name="attention.output.dense")(attention(q, k, v).reshape(x.shape))
        x = x + _Scale(ones, name="layer_scale1")(h)
        h = layer_norm(_EPSILON, jnp.float32, "norm2")(x)
        h = jax.nn.gelu(Dense(4 * width, name="mlp.fc1")(h), approximate=False)
        return x + _Scale(ones, name="layer_scale2")(Dense(width, name="mlp.fc2")(h))


class _Scale(nn.Module):
    initial: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.param("lambda1", self.initial, x.shape[-1:])


def bicubic_weights(source: int, target: int, offset: float) -> Float[np.ndarray, "t s"]:
    """PyTorch's bicubic interpolation along one axis, as a matrix; edges are repeated."""
    a = -0.75
    weights = np.zeros((target, source))
    # With an offset PyTorch is told a factor, and takes the places from it.
    centres = (np.arange(target) + 0.5) * source / (target + offset) - 0.5
    for row, centre in zip(weights, centres, strict=True):
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            d = abs(centre - tap)
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            row[min(max(tap, 0), source - 1)] += w
    return weights
