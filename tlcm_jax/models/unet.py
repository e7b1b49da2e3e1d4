"""`UNet2DConditionModel`: the text-conditioned denoiser of the Stable Diffusion family.

Covers SD 1.x, SD 2.x, SDXL (base, refiner, inpainting), SSD-1B and Segmind-Vega, and LCM-style
guidance embedding, by config alone; attribute names are the checkpoint's own.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.models.embeddings import TimestepEmbedding, sinusoidal
from tlcm_jax.models.layers import Conv, Dtype, group_norm
from tlcm_jax.models.unet_blocks import DownBlock, MidBlock, UpBlock
from tlcm_jax.models.unet_config import UNetConfig


def feature_widths(config: UNetConfig) -> dict[str, int]:
    """The channels of each block whose states `features` returns, by the block's name."""
    widths = {f"down_blocks.{i}": c for i, c in enumerate(config.block_out_channels)}
    if config.mid_block_type is not None:
        widths["mid_block"] = config.block_out_channels[-1]
    return widths


class UNet2DConditionModel(nn.Module):
    """Predicts noise (or v) from a noisy latent, a timestep and text.

    Matches diffusers' `UNet2DConditionModel`.

    Attributes:
      config: the architecture.
      dtype: compute dtype; norms keep fp32 statistics whatever it is.
      remat: what the backward pass recomputes: `"none"`, each transformer block (`"blocks"`), or
        each resnet as well (`"all"`).
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.nowrap
    def example(self) -> tuple[Any, ...]:
        """Inputs to trace the initialisation with."""
        config = self.config
        text_time: tuple[Array | None, Array | None] = (None, None)
        if config.text_time:
            ids = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - ids
            text_time = (jnp.zeros((1, pooled)), jnp.zeros((1, 6)))
        width = config.time_cond_proj_dim
        return (
            jnp.zeros((1, 16, 16, config.in_channels)),
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, 8, config.cross_attention_dim)),
            *text_time,
            jnp.zeros((1, width)) if width else None,
        )

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Num[Array, " b"],
        encoder_hidden_states: Float[Array, "b m e"],
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b ids"] | None = None,
        timestep_cond: Float[Array, "b g"] | None = None,
        *,
        features: bool = False,
    ) -> Any:
        """Runs the network.

        Args:
          sample: noisy latents `[b, h, w, in_channels]`, of any height and width; networks for
            inpainting take the mask and the masked picture's latents in further channels.
          timesteps: `[b]`, in 0..999.
          encoder_hidden_states: text states `[b, n, cross_attention_dim]`.
          text_embeds: pooled text embedding `[b, p]`; needed by SDXL.
          time_ids: micro-conditioning `[b, 6]` (the refiner's `[b, 5]`); needed by SDXL.
          timestep_cond: `embeddings.guidance_embedding` `[b, time_cond_proj_dim]`; needed by
            LCM-style networks.
          features: stop after the middle, and return what the blocks up to there made.

        Returns:
          The prediction `[b, h, w, out_channels]`, fp32; or, with `features`, the states
          `[b, h', w', c']` at the end of each block, at the block's own resolution, by the
          block's name, in the order of `feature_widths`.

        Raises:
          ValueError: the input does not have the network's channels, or conditioning that the
            network needs is missing, has another width, or has no place in it.
        """
        config = self.config
        self._check(sample, encoder_hidden_states, text_embeds, time_ids, timestep_cond)
        embedding = self._embed(timesteps, text_embeds, time_ids, timestep_cond)
        context = encoder_hidden_states.astype(self.dtype)
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(sample)

        levels = len(config.block_out_channels)
        skips = [x]
        seen = {}
        for i in range(levels):
            block = DownBlock(
                **self._block(i, config.down_block_types[i], config.transformer_layers[i]),
                layers=config.layers_per_block[i],
                add_downsample=i < levels - 1,
                name=f"down_blocks.{i}",
            )
            x, states = block(x, embedding, context)
            skips += states
            seen[f"down_blocks.{i}"] = states[config.layers_per_block[i] - 1]

        if config.mid_block_type is not None:
            mid = self._block(levels - 1, "CrossAttn", (config.mid_transformer_layers,))
            pairs = 1 if config.mid_block_type == "UNetMidBlock2DCrossAttn" else 0
            x = MidBlock(**mid, layers=pairs, name="mid_block")(x, embedding, context)
            seen["mid_block"] = x
        if features:
            return seen

        for i in range(levels):
            level = levels - 1 - i
            layers = config.layers_per_block[level] + 1
            used, skips = skips[-layers:], skips[:-layers]
            up = UpBlock(
                **self._block(level, config.up_block_types[i], config.up_transformer_layers[i]),
                layers=layers,
                add_upsample=i < levels - 1,
                name=f"up_blocks.{i}",
            )
            # Odd latents: grow to exactly the next skip's size.
            size = skips[-1].shape[1:3] if skips else None
            x = up(x, used, embedding, context, size)

        x = nn.silu(
            group_norm(config.norm_num_groups, config.norm_eps, self.dtype, "conv_norm_out")(x)
        )
        x = Conv(config.out_channels, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)

    def _block(self, level: int, kind: str, depths: tuple[int, ...]) -> dict:
        """Arguments that a down, middle and up block of one level share."""
        config = self.config
        channels = config.block_out_channels[level]
        heads = config.num_attention_heads[level]
        transformer = dict(
            heads=heads,
            head_dim=channels // heads,
            linear_projection=config.use_linear_projection,
            remat=self.remat in ("blocks", "all"),
        )
        return dict(
            features=channels,
            depths=depths,
            transformer=transformer if kind.startswith("CrossAttn") else None,
            groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            dtype=self.dtype,
            remat=self.remat == "all",
        )

    def _check(
        self,
        sample: Float[Array, "b h w c"],
        encoder_hidden_states: Float[Array, "b m e"],
        text_embeds: Float[Array, "b p"] | None,
        time_ids: Float[Array, "b ids"] | None,
        timestep_cond: Float[Array, "b g"] | None,
    ) -> None:
        """Refuses inputs that do not fit the config, by name."""
        config = self.config
        if config.text_time and (text_embeds is None or time_ids is None):
            raise ValueError("this UNet needs text_embeds and time_ids (text_time conditioning)")
        wanted: dict[str, tuple[Array | None, int | None]] = {
            "sample": (sample, config.in_channels),
            "encoder_hidden_states": (encoder_hidden_states, config.cross_attention_dim),
            "timestep_cond": (timestep_cond, config.time_cond_proj_dim),
        }
        if text_embeds is not None and time_ids is not None and config.text_time:
            ids = time_ids.shape[-1] * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - ids
            wanted["text_embeds"] = (text_embeds, pooled)
        for name, (array, width) in wanted.items():
            given = None if array is None else array.shape[-1]
            if given != width:
                raise ValueError(f"this UNet takes {name} of width {width}, got {given}")

    def _embed(
        self,
        timesteps: Num[Array, " b"],
        text_embeds: Float[Array, "b p"] | None,
        time_ids: Float[Array, "b ids"] | None,
        timestep_cond: Float[Array, "b g"] | None,
    ) -> Float[Array, "b d"]:
        """Time embedding `[b, 4c]`, with SDXL's pooled text and size conditioning added."""
        config = self.config
        channels = config.block_out_channels[0]
        angles: dict[str, Any] = dict(
            flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        embedding = TimestepEmbedding(4 * channels, dtype=self.dtype, name="time_embedding")(
            sinusoidal(timesteps, channels, **angles), timestep_cond
        )
        if not config.text_time:
            return embedding
        assert text_embeds is not None and time_ids is not None  # `_check`
        ids = sinusoidal(time_ids.reshape(-1), config.addition_time_embed_dim, **angles)
        added = jnp.concatenate(
            [text_embeds.astype(jnp.float32), ids.reshape(time_ids.shape[0], -1)], axis=-1
        )
        return embedding + TimestepEmbedding(4 * channels, dtype=self.dtype, name="add_embedding")(
            added
        )
