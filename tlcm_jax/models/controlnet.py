"""`ControlNetModel`: a copy of a UNet's way down that reads a picture, and steers the UNet by it.

    r_k = scale Z_k(s_k),    s = encoder(conv_in(z) + E(picture), t, text)       (1)

(Zhang et al. 2023, arXiv 2302.05543), with Z_k a 1x1 convolution for each skip and the middle that
training begins at zero, and E a stack of convolutions that brings the picture to the latents' size.
`unet_encoder` says where r_k is added. Attribute names are the checkpoint's own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.models.conditioning import Residuals
from tlcm_jax.models.layers import Conv, Dtype
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.unet_encoder import UNetEncoder

_UP = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Architecture of a `ControlNetModel`: the UNet's own names, of whose way up there is none.

    Attributes:
      conditioning_channels: of the picture.
      conditioning_embedding_out_channels: widths of E's stages, each after the first at half the
        resolution of the one before.
      bgr: the picture's channels are read in the order blue, green, red.
    """

    conditioning_channels: int
    conditioning_embedding_out_channels: tuple[int, ...]
    bgr: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ControlNetConfig":
        """Parses a diffusers `config.json`; absent keys take diffusers' defaults.

        Raises:
          ValueError: a field asks for something this port does not implement; it is named.
        """
        if raw.get("global_pool_conditions"):
            raise ValueError(
                "controlnet config: global_pool_conditions=True is not supported: such a network "
                "passes a picture's content on, without where it lies (shuffle)"
            )
        order = raw.get("controlnet_conditioning_channel_order", "rgb")
        if order not in ("rgb", "bgr"):
            raise ValueError(
                f"controlnet config: controlnet_conditioning_channel_order={order!r} is neither "
                "'rgb' nor 'bgr'"
            )
        down = raw.get("down_block_types", (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"))
        # A UNet's config has a way up; here it is never built.
        up = [_UP.get(kind, kind) for kind in reversed(down)]
        shared = UNetConfig.from_dict({**raw, "up_block_types": up, "time_cond_proj_dim": None})
        return cls(
            **{field.name: getattr(shared, field.name) for field in dataclasses.fields(shared)},
            conditioning_channels=raw.get("conditioning_channels", 3),
            conditioning_embedding_out_channels=tuple(
                raw.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
            ),
            bgr=order == "bgr",
        )

    @property
    def downsampling(self) -> int:
        """Pixels of the picture for one of the latents, along each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetConditioningEmbedding(nn.Module):
    """Equation (1)'s E, `[b, f h, f w, c] -> [b, h, w, features]`, f the config's downsampling."""

    features: int
    widths: tuple[int, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w out"]:
        x = nn.silu(Conv(self.widths[0], dtype=self.dtype, name="conv_in")(x))
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            x = nn.silu(Conv(width, dtype=self.dtype, name=f"blocks.{2 * i}")(x))
            x = nn.silu(Conv(wider, strides=2, dtype=self.dtype, name=f"blocks.{2 * i + 1}")(x))
        return Conv(self.features, dtype=self.dtype, name="conv_out")(x)


class ControlNetModel(UNetEncoder):
    """A picture's residuals for a UNet, equation (1).

    Matches diffusers' `ControlNetModel` without its `guess_mode`. For its attributes see
    `UNetEncoder`.
    """

    config: ControlNetConfig
    kind = "ControlNet"

    @nn.nowrap
    def example(self) -> tuple[Any, ...]:
        """See `UNetEncoder`."""
        latents, timesteps, text, *text_time = super().example()
        side = latents.shape[1] * self.config.downsampling
        image = jnp.zeros((1, side, side, self.config.conditioning_channels))
        return latents, timesteps, text, image, jnp.ones(1), *text_time

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b m e"],
        image: Float[Array, "b H W k"],
        scale: Float[Array, " b"],
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b ids"] | None = None,
    ) -> Residuals:
        """Runs the network.

        Args:
          sample: the UNet's noisy latents.
          timesteps: `[b]`, in 0..999.
          encoder_hidden_states: text states `[b, n, cross_attention_dim]`.
          image: in 0 .. 1, `downsampling` times as high and wide as the latents.
          scale: `[b]`, what the residuals are multiplied by.
          text_embeds: see `UNet2DConditionModel`.
          time_ids: see `UNet2DConditionModel`.

        Raises:
          ValueError: inputs do not fit the config, or the picture does not fit the latents.
        """
        config = self.config
        self._check(
            sample=sample,
            encoder_hidden_states=encoder_hidden_states,
            text_embeds=text_embeds,
            time_ids=time_ids,
        )
        wanted = tuple(config.downsampling * side for side in sample.shape[1:3])
        if image.shape[1:] != (*wanted, config.conditioning_channels):
            raise ValueError(
                f"this ControlNet takes pictures of {(*wanted, config.conditioning_channels)} "
                f"beside such latents, got {image.shape[1:]}"
            )
        embedding = self._embed(timesteps, text_embeds, time_ids)
        context = encoder_hidden_states.astype(self.dtype)
        width = config.block_out_channels[0]
        x = Conv(width, dtype=self.dtype, name="conv_in")(sample)
        x = x + ControlNetConditioningEmbedding(
            width,
            config.conditioning_embedding_out_channels,
            self.dtype,
            name="controlnet_cond_embedding",
        )(image[..., ::-1] if config.bgr else image)
        x, skips, _ = self._encode(x, embedding, context)

        def residual(name: str, state: Array) -> Array:
            layer = Conv(state.shape[-1], kernel_size=1, padding=0, dtype=self.dtype, name=name)
            return scale[:, None, None, None].astype(self.dtype) * layer(state)

        down = [residual(f"controlnet_down_blocks.{k}", state) for k, state in enumerate(skips)]
        return Residuals(down=tuple(down), mid=residual("controlnet_mid_block", x))
