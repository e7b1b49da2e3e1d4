"""Inception-v3 as the FID has it: the network of 2015-12-05, up to its last pooling.

It is Szegedy et al.'s (arXiv 1512.00567) but for its pools: averages leave the padding out, and the
last block takes the maximum where the paper takes the mean. Batch norms are applied with their
stored statistics. Names are torchvision's, which the FID's PyTorch port of the weights uses.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import StoredBatchNorm

_EPSILON = 1e-3


class FIDInception(nn.Module):
    """Images in -1..1 to the features that the FID compares.

    Attributes:
      divide: every width over this; 1 is the published network, more a small one for tests.
    """

    divide: int = 1

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        x = self._conv(images, "Conv2d_1a_3x3", 32, 3, strides=2)
        x = self._conv(x, "Conv2d_2a_3x3", 32, 3)
        x = self._conv(x, "Conv2d_2b_3x3", 64, 3, padding=1)
        x = _max_pool(x)
        x = self._conv(x, "Conv2d_3b_1x1", 80, 1)
        x = self._conv(x, "Conv2d_4a_3x3", 192, 3)
        x = _max_pool(x)
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self._a(x, name, pooled)
        x = self._b(x, "Mixed_6a")
        for name, inner in (
            ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)
        ):  # fmt: skip
            x = self._c(x, name, inner)
        x = self._d(x, "Mixed_7a")
        x = self._e(x, "Mixed_7b", _average(x))
        x = self._e(x, "Mixed_7c", _max_pool(x, strides=1, padding=1))
        return jnp.mean(x, axis=(1, 2))

    def _conv(
        self,
        x: Array,
        name: str,
        width: int,
        kernel: int | tuple[int, int],
        *,
        strides: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> Array:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (padding, padding) if isinstance(padding, int) else padding
        return _ConvNorm(width // self.divide, kernel, strides, padding, name=name)(x)

    def _chain(self, x: Array, stem: str, layers: Sequence[tuple]) -> Array:
        """Convolutions one after the other: suffix, width and kernel, padded to keep the size."""
        for suffix, width, kernel in layers:
            sides = (kernel, kernel) if isinstance(kernel, int) else kernel
            around = (sides[0] // 2, sides[1] // 2)
            x = self._conv(x, f"{stem}{suffix}", width, kernel, padding=around)
        return x

    def _a(self, x: Array, name: str, pooled: int) -> Array:
        double = [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)]
        return jnp.concatenate(
            [
                self._chain(x, f"{name}.branch1x1", [("", 64, 1)]),
                self._chain(x, f"{name}.branch5x5", [("_1", 48, 1), ("_2", 64, 5)]),
                self._chain(x, f"{name}.branch3x3dbl", double),
                self._chain(_average(x), f"{name}.branch_pool", [("", pooled, 1)]),
            ],
            axis=-1,
        )

    def _b(self, x: Array, name: str) -> Array:
        double = self._chain(x, f"{name}.branch3x3dbl", [("_1", 64, 1), ("_2", 96, 3)])
        return jnp.concatenate(
            [
                self._conv(x, f"{name}.branch3x3", 384, 3, strides=2),
                self._conv(double, f"{name}.branch3x3dbl_3", 96, 3, strides=2),
                _max_pool(x),
            ],
            axis=-1,
        )

    def _c(self, x: Array, name: str, inner: int) -> Array:
        once = [("_1", inner, 1), ("_2", inner, (1, 7)), ("_3", 192, (7, 1))]
        twice = [
            ("_1", inner, 1), ("_2", inner, (7, 1)), ("_3", inner, (1, 7)), ("_4", inner, (7, 1)),
            ("_5", 192, (1, 7)),
        ]  # fmt: skip
        return jnp.concatenate(
            [
                self._chain(x, f"{name}.branch1x1", [("", 192, 1)]),
                self._chain(x, f"{name}.branch7x7", once),
                self._chain(x, f"{name}.branch7x7dbl", twice),
                self._chain(_average(x), f"{name}.branch_pool", [("", 192, 1)]),
            ],
            axis=-1,
        )

    def _d(self, x: Array, name: str) -> Array:
        first = self._chain(x, f"{name}.branch3x3", [("_1", 192, 1)])
        layers = [("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1))]
        second = self._chain(x, f"{name}.branch7x7x3", layers)
        return jnp.concatenate(
            [
                self._conv(first, f"{name}.branch3x3_2", 320, 3, strides=2),
                self._conv(second, f"{name}.branch7x7x3_4", 192, 3, strides=2),
                _max_pool(x),
            ],
            axis=-1,
        )

    def _e(self, x: Array, name: str, pooled: Array) -> Array:
        first = self._chain(x, f"{name}.branch3x3", [("_1", 384, 1)])
        second = self._chain(x, f"{name}.branch3x3dbl", [("_1", 448, 1), ("_2", 384, 3)])
        return jnp.concatenate(
            [
                self._chain(x, f"{name}.branch1x1", [("", 320, 1)]),
                self._chain(first, f"{name}.branch3x3", [("_2a", 384, (1, 3))]),
                self._chain(first, f"{name}.branch3x3", [("_2b", 384, (3, 1))]),
                self._chain(second, f"{name}.branch3x3dbl", [("_3a", 384, (1, 3))]),
                self._chain(second, f"{name}.branch3x3dbl", [("_3b", 384, (3, 1))]),
                self._chain(pooled, f"{name}.branch_pool", [("", 192, 1)]),
            ],
            axis=-1,
        )


class _ConvNorm(nn.Module):
    """A convolution without bias, a batch norm at inference, a ReLU."""

    width: int
    kernel: tuple[int, int]
    strides: int
    padding: tuple[int, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(
            self.width, self.kernel, self.strides, [(p, p) for p in self.padding], use_bias=False,
            name="conv",
        )(x)  # fmt: skip
        return jax.nn.relu(StoredBatchNorm(_EPSILON, name="bn")(x))


def _max_pool(x: Array, strides: int = 2, padding: int = 0) -> Array:
    return nn.max_pool(x, (3, 3), (strides, strides), [(padding, padding)] * 2)


def _average(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
