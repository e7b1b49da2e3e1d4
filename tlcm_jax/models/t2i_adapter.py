"""`T2IAdapter`: a small network whose features of a picture are added to a UNet's blocks.

    f_i = scale B_i(f_{i-1}),    f_{-1} = unshuffle(picture)                     (1)

(Mou et al. 2023, arXiv 2302.08453), the scale applied to what is handed on only. It sees neither
noise nor time nor text. `unet_encoder` says where f_i is added. Attribute names are the
checkpoint's own.

| `adapter_type` | before B_0 | blocks at half the resolution | residual blocks |
|---|---|---|---|
| `full_adapter` | a 3x3 convolution | all but the first | 3x3, ReLU, 1x1 |
| `full_adapter_xl` | a 3x3 convolution | the third | 3x3, ReLU, 1x1 |
| `light_adapter` | nothing | all but the first | 3x3, ReLU, 3x3, at a quarter of the width |
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.conditioning import Residuals
from tlcm_jax.models.layers import Conv, Dtype

KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig:
    """Architecture of a `T2IAdapter`; the names are diffusers' own.

    Attributes:
      in_channels: of the picture: 3, or 1 of a grey one.
      channels: of the blocks; the light adapter has one more, as wide as the last.
      num_res_blocks: in each block.
      downscale_factor: side of the squares of pixels that become one.
      adapter_type: one of `KINDS`.
    """

    in_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    downscale_factor: int
    adapter_type: str

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "T2IAdapterConfig":
        """Parses a diffusers `config.json`; absent keys take diffusers' defaults.

        Raises:
          ValueError: a kind of adapter that there is not, or sizes that no adapter has.
        """
        kind = raw.get("adapter_type", KINDS[0])
        if kind not in KINDS:
            raise ValueError(f"adapter config: adapter_type={kind!r} is not one of {KINDS}")
        config = cls(
            in_channels=raw.get("in_channels", 3),
            channels=tuple(raw.get("channels", (320, 640, 1280, 1280))),
            num_res_blocks=raw.get("num_res_blocks", 2),
            downscale_factor=raw.get("downscale_factor", 8),
            adapter_type=kind,
        )
        blocks = config.num_res_blocks * len(config.channels)
        if not 1 <= blocks <= 100 or config.downscale_factor < 1:
            raise ValueError(
                f"adapter config: {blocks} residual blocks (num_res_blocks, channels) and "
                f"downscale_factor={config.downscale_factor}: give 1 to 100, and at least 1"
            )
        return config


class AdapterBlock(nn.Module):
    """One B of equation (1).

    Attributes:
      features: its width.
      layers: residual blocks.
      down: it begins at half the resolution, rounded up.
      light: its residual blocks are of a quarter of the width, between 1x1 convolutions.
    """

    features: int
    layers: int
    down: bool
    light: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w out"]:
        inner = self.features // 4 if self.light else self.features

        def pointwise(features: int, name: str) -> Conv:
            return Conv(features, kernel_size=1, padding=0, dtype=self.dtype, name=name)

        if self.down:
            x = _halved(x)
        if self.light or x.shape[-1] != inner:
            x = pointwise(inner, "in_conv")(x)
        for i in range(self.layers):
            h = nn.relu(Conv(inner, dtype=self.dtype, name=f"resnets.{i}.block1")(x))
            second = f"resnets.{i}.block2"
            last = Conv(inner, dtype=self.dtype, name=second) if self.light else None
            x = x + (last or pointwise(inner, second))(h)
        return pointwise(self.features, "out_conv")(x) if self.light else x


class _Adapter(nn.Module):
    config: T2IAdapterConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> tuple[Array, ...]:
        config = self.config
        light, widths = config.adapter_type == "light_adapter", config.channels
        x = _unshuffle(x.astype(self.dtype), config.downscale_factor)
        if light:
            widths = (*widths, widths[-1])
        else:
            x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        features = []
        for i, width in enumerate(widths):
            down = i == 2 if config.adapter_type == "full_adapter_xl" else i > 0
            block = AdapterBlock(
                width, config.num_res_blocks, down, light, self.dtype, name=f"body.{i}"
            )
            features.append(x := block(x))
        return tuple(features)


class T2IAdapter(nn.Module):
    """A picture's features for a UNet's blocks, equation (1).

    Matches diffusers' `T2IAdapter`.
    """

    config: T2IAdapterConfig
    dtype: Dtype = jnp.float32

    @nn.nowrap
    def example(self) -> tuple[Any, ...]:
        """Inputs to trace the initialisation with."""
        side = 16 * self.config.downscale_factor
        return jnp.zeros((1, side, side, self.config.in_channels)), jnp.ones(1)

    @nn.compact
    def __call__(self, image: Float[Array, "b H W c"], scale: Float[Array, " b"]) -> Residuals:
        """Runs the network.

        Args:
          image: in 0 .. 1, of sides that `downscale_factor` divides.
          scale: `[b]`, what the features are multiplied by.

        Raises:
          ValueError: the picture has other channels or sides.
        """
        config = self.config
        factor = config.downscale_factor
        if image.shape[3] != config.in_channels or any(n % factor for n in image.shape[1:3]):
            raise ValueError(
                f"this T2I-Adapter takes pictures of {config.in_channels} channels and sides that "
                f"{factor} divides, got {image.shape[1:]}"
            )
        features = _Adapter(config, self.dtype, name="adapter")(image)
        by = scale[:, None, None, None].astype(self.dtype)
        return Residuals(adapter_features=tuple(by * feature for feature in features))


def _unshuffle(x: Float[Array, "b H W c"], factor: int) -> Float[Array, "b h w out"]:
    """Squares of pixels as channels, in the order of `torch.nn.PixelUnshuffle`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(*x.shape[:3], channels * factor * factor)


def _halved(x: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
    """Means of 2 x 2 pixels, of those that there are at odd edges (`ceil_mode`)."""

    def sums(x: Array) -> Array:
        padding = ((0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0))
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), padding)

    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
