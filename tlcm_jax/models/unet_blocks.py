"""Down, middle and up blocks of the UNet, with or without cross-attention."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Dtype
from tlcm_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from tlcm_jax.models.transformer import Transformer2DModel


def plus(
    x: Float[Array, "b h w c"], features: Float[Array, "b _h _w _c"]
) -> Float[Array, "b h w c"]:
    """A state with a T2I-Adapter's features added.

    Raises:
      ValueError: they are of another shape: of an adapter, or a picture's size, that does not fit.
    """
    if features.shape != x.shape:
        raise ValueError(
            f"a T2I-Adapter's features do not fit this UNet: {features.shape} for {x.shape}"
        )
    return x + features.astype(x.dtype)


class _Block(nn.Module):
    """What every block is made of: how to build its resnets and its attentions.

    Attributes:
      features: channels of the block's output.
      layers: number of resnets.
      transformer: arguments of each `Transformer2DModel`; None in blocks without attention.
      depths: transformer layers after each resnet.
      remat: recompute each resnet's activations in the backward pass.
    """

    features: int
    layers: int
    depths: tuple[int, ...] = ()
    transformer: Any = None
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    remat: bool = False

    def resnet(self, i: int) -> ResnetBlock2D:
        resnet = nn.remat(ResnetBlock2D) if self.remat else ResnetBlock2D
        return resnet(self.features, self.groups, self.epsilon, self.dtype, name=f"resnets.{i}")

    def attention(self, i: int) -> Transformer2DModel:
        return Transformer2DModel(
            layers=self.depths[i],
            groups=self.groups,
            dtype=self.dtype,
            name=f"attentions.{i}",
            **self.transformer,
        )


class DownBlock(_Block):
    """Resnets (and attentions), then an optional downsampler; returns every state as a skip.

    A T2I-Adapter's features are added after the last attention, or, in a block without any, at
    its end (`unet_encoder`, equation 2).
    """

    add_downsample: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time_embedding: Float[Array, "b d"],
        context: Float[Array, "b m e"],
        adapter_features: Float[Array, "b _h _w _c"] | None = None,
    ) -> tuple[Float[Array, "b down_h down_w out"], list[Array]]:
        skips = []
        for i in range(self.layers):
            x = self.resnet(i)(x, time_embedding)
            if self.transformer is not None:
                x = self.attention(i)(x, context)
                if adapter_features is not None and i == self.layers - 1:
                    x = plus(x, adapter_features)
            skips.append(x)
        if self.add_downsample:
            x = Downsample2D(self.features, dtype=self.dtype, name="downsamplers.0")(x)
            skips.append(x)
        if adapter_features is not None and self.transformer is None:
            x = skips[-1] = plus(x, adapter_features)
        return x, skips


class MidBlock(_Block):
    """Resnet, then attention and resnet pairs, at the lowest resolution."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time_embedding: Float[Array, "b d"],
        context: Float[Array, "b m e"],
    ) -> Float[Array, "b h w c"]:
        x = self.resnet(0)(x, time_embedding)
        for i in range(self.layers):
            x = self.attention(i)(x, context)
            x = self.resnet(i + 1)(x, time_embedding)
        return x


class UpBlock(_Block):
    """Resnets on the state joined with a skip each (and attentions), then an optional upsampler."""

    add_upsample: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        skips: list[Array],
        time_embedding: Float[Array, "b d"],
        context: Float[Array, "b m e"],
        size: tuple[int, int] | None,
    ) -> Float[Array, "b up_h up_w out"]:
        for i in range(self.layers):
            x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = self.resnet(i)(x, time_embedding)
            if self.transformer is not None:
                x = self.attention(i)(x, context)
        if self.add_upsample:
            x = Upsample2D(self.features, dtype=self.dtype, name="upsamplers.0")(x, size)
        return x
