"""`AutoencoderKL`: images to latents and back.

Latents at this room's doors are the network's own; `scaling_factor` (and `shift_factor`, which
the SD family does not use) is applied by whoever owns the pipeline.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.config_values import switch
from tlcm_jax.models.layers import Conv, Dtype, group_norm
from tlcm_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from tlcm_jax.models.transformer import Attention

_EPSILON = 1e-6
_MOST_RESNETS = 200  # of one side; the published ones have 12
# Fields whose only supported value is the one given: what they switch on is not implemented.
_ONLY = {"act_fn": "silu", "latents_mean": None, "latents_std": None, "shift_factor": None}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of an `AutoencoderKL`; the names are diffusers' own."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool

    def __post_init__(self) -> None:
        if self.layers_per_block * len(self.block_out_channels) > _MOST_RESNETS:
            raise ValueError(
                f"vae config: layers_per_block = {self.layers_per_block} at "
                f"{len(self.block_out_channels)} levels: more than {_MOST_RESNETS} are not traced"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "VAEConfig":
        """Parses a diffusers `vae/config.json`.

        Raises:
          ValueError: a field asks for something this port does not implement; it is named.
        """
        blocks = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        used = {*raw.get("down_block_types", ()), *raw.get("up_block_types", ())}
        if used - blocks:
            raise ValueError(f"vae config: block types {sorted(used - blocks)} are not supported")
        for name, value in _ONLY.items():
            if raw.get(name) not in (None, value):
                raise ValueError(
                    f"vae config: {name}={raw[name]!r} is not supported (only {value!r})"
                )
        return cls(
            in_channels=raw.get("in_channels", 3),
            out_channels=raw.get("out_channels", 3),
            latent_channels=raw.get("latent_channels", 4),
            block_out_channels=tuple(raw["block_out_channels"]),
            layers_per_block=raw.get("layers_per_block", 1),
            norm_num_groups=raw.get("norm_num_groups", 32),
            # A null would be an error in diffusers.
            scaling_factor=0.18215 if raw.get("scaling_factor") is None else raw["scaling_factor"],
            mid_block_add_attention=switch(raw, "mid_block_add_attention", True),
            use_quant_conv=switch(raw, "use_quant_conv", True),
            use_post_quant_conv=switch(raw, "use_post_quant_conv", True),
        )

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class _Block(nn.Module):
    """A run of resnets, then an optional resampler."""

    features: int
    layers: int
    groups: int
    resample: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b out_h out_w out"]:
        for i in range(self.layers):
            x = ResnetBlock2D(
                self.features, self.groups, _EPSILON, self.dtype, name=f"resnets.{i}"
            )(x)
        if self.resample == "down":
            x = Downsample2D(self.features, 0, self.dtype, name="downsamplers.0")(x)
        if self.resample == "up":
            x = Upsample2D(self.features, self.dtype, name="upsamplers.0")(x)
        return x


class _PixelAttention(Attention):
    """Single-head self-attention over pixels, with its own group norm and residual."""

    groups: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b out_h out_w out"]:
        batch, height, width, channels = x.shape
        h = group_norm(self.groups, _EPSILON, self.dtype, "group_norm")(x)
        # The parent's layers join this scope: the checkpoint keeps them beside group_norm.
        return x + super().__call__(h.reshape(batch, height * width, channels)).reshape(x.shape)


class _MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    features: int
    groups: int
    add_attention: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b out_h out_w out"]:
        def resnet(name: str) -> ResnetBlock2D:
            return ResnetBlock2D(self.features, self.groups, _EPSILON, self.dtype, name=name)

        x = resnet("resnets.0")(x)
        if self.add_attention:
            x = _PixelAttention(
                1, x.shape[-1], True, self.dtype, groups=self.groups, name="attentions.0"
            )(x)
        return resnet("resnets.1")(x)


class Encoder(nn.Module):
    """`[b, h, w, 3]` pixels to `[b, h/f, w/f, 2 * latent_channels]` moments."""

    config: VAEConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b out_h out_w out"]:
        config, dtype = self.config, self.dtype
        channels, groups = config.block_out_channels, config.norm_num_groups
        x = Conv(channels[0], dtype=dtype, name="conv_in")(x)
        for i, features in enumerate(channels):
            resample = "down" if i < len(channels) - 1 else "none"
            x = _Block(
                features, config.layers_per_block, groups, resample, dtype, name=f"down_blocks.{i}"
            )(x)
        x = _MidBlock(
            channels[-1], groups, config.mid_block_add_attention, dtype, name="mid_block"
        )(x)
        x = nn.silu(group_norm(groups, _EPSILON, dtype, "conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """`[b, h/f, w/f, latent_channels]` latents to `[b, h, w, 3]` pixels.

    In two halves, for decoding by tiles: `middle` ends with the middle block, all at the latents'
    resolution; `upwards` goes on from there.
    """

    config: VAEConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], middle: bool = True, upwards: bool = True
    ) -> Float[Array, "b H W out"]:
        config, dtype = self.config, self.dtype
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        if middle:
            x = Conv(channels[0], dtype=dtype, name="conv_in")(x)
            x = _MidBlock(
                channels[0], groups, config.mid_block_add_attention, dtype, name="mid_block"
            )(x)
        if not upwards:
            return x
        for i, features in enumerate(channels):
            resample = "up" if i < len(channels) - 1 else "none"
            x = _Block(
                features, config.layers_per_block + 1, groups, resample, dtype,
                name=f"up_blocks.{i}",
            )(x)  # fmt: skip
        x = nn.silu(group_norm(groups, _EPSILON, dtype, "conv_norm_out")(x))
        return Conv(config.out_channels, dtype=dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder. Matches diffusers' `AutoencoderKL`."""

    config: VAEConfig
    dtype: Dtype = jnp.float32

    @nn.nowrap
    def example(self) -> tuple[Array]:
        """Inputs to trace the initialisation with."""
        side = 2 * self.config.downsampling
        return (jnp.zeros((1, side, side, self.config.in_channels)),)

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        channels = self.config.latent_channels
        one_by_one = dict(kernel_size=1, padding=0, dtype=self.dtype)
        if self.config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, **one_by_one)
        if self.config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, **one_by_one)

    def encode(
        self, images: Float[Array, "b H W channels"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the posterior, each `[b, h/f, w/f, c]`, fp32.

        Args:
          images: `[b, h, w, 3]` in -1..1.
        """
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W channels"]:
        """Images `[b, h, w, 3]`, nominally in -1..1, fp32, from unscaled latents.

        In memory-bound cases `vae_tiling.decode_tiled` does the same by tiles. SDXL's published
        weights overflow fp16 here (`force_upcast`); bf16 has fp32's range and does not.
        """
        return self.decode_upwards(self.decode_middle(latents))

    def decode_middle(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The first half of `decode`, `[b, h/f, w/f, d]`, at the latents' resolution."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents, upwards=False)

    def decode_upwards(self, hidden: Float[Array, "b h w d"]) -> Float[Array, "b H W channels"]:
        """The second half of `decode`, from what `decode_middle` returns."""
        return self.decoder(hidden, middle=False).astype(jnp.float32)

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Reconstruction through the posterior mean."""
        return self.decode(self.encode(images)[0])
