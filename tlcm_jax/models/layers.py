"""Linear and convolution layers that know how to be adapted, and the norms the family uses.

Each layer reads its own weights from the `params` collection and, where the `lora` collection
holds factors under the same path, adds the low-rank update `B(A(x))` to its output. The scale
alpha / rank belongs to the caller (`models.lora.scaled`), so one set of base weights serves
every adapter.

In bf16 a layer's output is rounded once: its products are accumulated and handed on in fp32, and
the update and the bias are added to them there. Of the update, what lies between its two factors is
rounded too, as the second product's input.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = jnp.dtype | type

# The side, in pixels, up to which convolutions are products of patches.
_SMALL = 8


# A product of two arrays of one dtype, which takes `preferred_element_type`.
Product = Callable[..., Array]


def accumulated(product: Product, x: Array, kernel: Array) -> Array:
    """`product(x, kernel)` in fp32, before any rounding; its gradients are those of the plain one.

    Without a rule of its own the way back would have fp32 cotangents beside bf16 operands, which
    is slower than the bf16 products that the gradients are worth.
    """
    if x.dtype == jnp.float32:
        return product(x, kernel)
    return _accumulated(product, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _accumulated(product: Product, x: Array, kernel: Array) -> Array:
    return product(x, kernel, preferred_element_type=jnp.float32)


def _forward(product: Product, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _accumulated(product, x, kernel), (x, kernel)


def _backward(product: Product, kept: tuple[Array, Array], cotangent: Array) -> tuple:
    _, pull = jax.vjp(product, *kept)
    return pull(cotangent.astype(kept[0].dtype))


_accumulated.defvjp(_forward, _backward)


class Dense(nn.Module):
    """Linear layer `[..., in] -> [..., features]` with an optional low-rank update.

    Matches `torch.nn.Linear` with a PEFT LoRA of scale 1; the kernel is stored `[in, features]`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, " *batch c"]) -> Float[Array, " *batch out"]:
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32
        )
        x = x.astype(self.dtype)
        y = accumulated(jnp.matmul, x, jnp.asarray(kernel, self.dtype))
        if self.has_variable("lora", "lora_A"):
            down = self.get_variable("lora", "lora_A").astype(self.dtype)
            up = self.get_variable("lora", "lora_B").astype(self.dtype)
            y = y + accumulated(jnp.matmul, x @ down, up)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return y.astype(self.dtype)


class Conv(nn.Module):
    """2-D convolution `[b, h, w, in] -> [b, h', w', features]` with an optional low-rank update.

    Matches `torch.nn.Conv2d` (explicit, symmetric padding) with a PEFT LoRA of scale 1: `lora_A`
    is a convolution of the layer's own geometry, `lora_B` a 1x1 one. Kernels are stored HWIO.

    Attributes:
      padding: pixels added on each side, or `((top, bottom), (left, right))`.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | Sequence[tuple[int, int]] = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b out_h out_w out"]:
        size = self.kernel_size
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (size, size, x.shape[-1], self.features),
            jnp.float32,
        )
        x = x.astype(self.dtype)
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        small = max(x.shape[1:3]) <= _SMALL
        convolve = functools.partial(
            _convolve_patches if small else _convolve, self.strides, tuple(padding)
        )
        y = accumulated(convolve, x, jnp.asarray(kernel, self.dtype))
        if self.has_variable("lora", "lora_A"):
            down = convolve(x, self.get_variable("lora", "lora_A").astype(self.dtype))
            up = self.get_variable("lora", "lora_B").astype(self.dtype)
            y = y + accumulated(jnp.matmul, down, up[0, 0])
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return y.astype(self.dtype)


def _convolve(
    stride: int,
    padding: Sequence[tuple[int, int]],
    x: Array,
    kernel: Array,
    preferred_element_type: Dtype | None = None,
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=preferred_element_type,
    )


def _convolve_patches(
    stride: int,
    padding: Sequence[tuple[int, int]],
    x: Array,
    kernel: Array,
    preferred_element_type: Dtype | None = None,
) -> Array:
    """The same convolution as one matrix product over gathered patches, for small images.

    XLA's own on a CPU does a sample of 8 x 8 x 1280 (SDXL's middle, at 256 pixels) at 55 GFLOP/s,
    this at 160; smaller images than the kernel 5 to 10 times slower than this.
    """
    size = kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((side - size) // stride + 1 for side in padded.shape[1:3])
    patches = [
        padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
        for i in range(size)
        for j in range(size)
    ]
    patches = [patch[:, :height, :width] for patch in patches]
    return jnp.matmul(
        jnp.concatenate(patches, axis=-1),
        kernel.reshape(-1, kernel.shape[-1]),
        preferred_element_type=preferred_element_type,
    )


def group_norm(groups: int, epsilon: float, dtype: Dtype, name: str) -> nn.Module:
    """Group norm with fp32 statistics: two-pass as PyTorch's in fp32, else `GroupNorm`."""
    if dtype == jnp.float32:
        return nn.GroupNorm(
            num_groups=groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name
        )
    return GroupNorm(groups, epsilon, dtype, name=name)


def layer_norm(epsilon: float, dtype: Dtype, name: str) -> nn.LayerNorm:
    """Layer norm with two-pass fp32 statistics, as PyTorch computes them."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def moments(x: Float[Array, "..."], axes: Sequence[int]) -> tuple[Array, Array]:
    """Mean and variance over `axes`, which are kept with length 1; fp32, in one pass over x.

    About k, one of the values themselves, as sums of squares about 0 would cancel where the mean
    is large against the deviation:

        mean = k + E[x - k],   var = E[(x - k)^2] - E[x - k]^2.                  (1)
    """
    first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))
    near = jax.lax.stop_gradient(x[first]).astype(jnp.float32)
    shifted = x.astype(jnp.float32) - near
    offset = jnp.mean(shifted, axes, keepdims=True)
    variance = jnp.mean(jnp.square(shifted), axes, keepdims=True) - jnp.square(offset)
    return near + offset, jnp.maximum(variance, 0)


class GroupNorm(nn.Module):
    """Group norm of `x [b, ..., c]` in one pass (`moments`) that leaves x in its layout.

    The moments of each channel, mu_c and v_c, make those of its group (Chan et al. 1979):

        mean = E_c[mu_c],   var = E_c[v_c + (mu_c - mean)^2].                    (2)
    """

    groups: int
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b *place c"]) -> Float[Array, "b *place c"]:
        means, variances = moments(x, tuple(range(1, x.ndim - 1)))
        apart = (*means.shape[:-1], self.groups, -1)
        means, variances = means.reshape(apart), variances.reshape(apart)
        mean = jnp.mean(means, -1, keepdims=True)
        variance = jnp.mean(variances + jnp.square(means - mean), -1, keepdims=True)
        channels = (*x.shape[:1], *(1,) * (x.ndim - 2), x.shape[-1])
        mean, variance = (
            jnp.broadcast_to(each, means.shape).reshape(channels) for each in (mean, variance)
        )
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], jnp.float32)
        steepness = jax.lax.rsqrt(variance + self.epsilon) * scale
        return ((x.astype(jnp.float32) - mean) * steepness + bias).astype(self.dtype)


class StoredBatchNorm(nn.Module):
    """Batch norm at inference, by stored statistics: `torch.nn.BatchNorm2d(...).eval()`."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, " *batch c"]) -> Float[Array, " *batch c"]:
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        shape = x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean = self.param("running_mean", zeros, shape)
        variance = self.param("running_var", ones, shape)
        return (x - mean) * (scale / jnp.sqrt(variance + self.epsilon)) + bias


def upsample_nearest(
    x: Float[Array, "b h w c"], height: int, width: int
) -> Float[Array, "b H W c"]:
    """Nearest-neighbour upsampling `[b, h, w, c] -> [b, height, width, c]`.

    Matches `torch.nn.functional.interpolate(mode="nearest")`, also to sizes that are not an
    exact multiple (odd latents).
    """
    if height == 2 * x.shape[1] and width == 2 * x.shape[2]:
        return x.repeat(2, axis=1).repeat(2, axis=2)
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]
