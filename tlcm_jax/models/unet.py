"""`UNet2DConditionModel`: the text-conditioned denoiser of the Stable Diffusion family.

Covers SD 1.x, SD 2.x, SDXL (base, refiner, inpainting), SSD-1B and Segmind-Vega, and LCM-style
guidance embedding, by config alone; attribute names are the checkpoint's own.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.models.conditioning import Residuals
from tlcm_jax.models.layers import Conv, group_norm
from tlcm_jax.models.unet_blocks import UpBlock
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.models.unet_encoder import UNetEncoder, steered


def feature_widths(config: UNetConfig) -> dict[str, int]:
    """The channels of each block whose states `features` returns, by the block's name."""
    widths = {f"down_blocks.{i}": c for i, c in enumerate(config.block_out_channels)}
    if config.mid_block_type is not None:
        widths["mid_block"] = config.block_out_channels[-1]
    return widths


class UNet2DConditionModel(UNetEncoder):
    """Predicts noise (or v) from a noisy latent, a timestep and text.

    Matches diffusers' `UNet2DConditionModel`. For its attributes see `UNetEncoder`.
    """

    kind = "UNet"

    @nn.nowrap
    def example(self) -> tuple[Any, ...]:
        """See `UNetEncoder`."""
        width = self.config.time_cond_proj_dim
        return (*super().example(), jnp.zeros((1, width)) if width else None)

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
        residuals: Residuals | None = None,
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
          residuals: what control networks add.
          features: stop after the middle, and return what the blocks up to there made.

        Returns:
          The prediction `[b, h, w, out_channels]`, fp32; or, with `features`, the states
          `[b, h', w', c']` at the end of each block, at the block's own resolution, by the
          block's name, in the order of `feature_widths`.

        Raises:
          ValueError: the input does not have the network's channels, or conditioning that the
            network needs is missing, has another width, or has no place in it; or residuals are of
            other shapes than its states.
        """
        config, residuals = self.config, residuals or Residuals()
        self._check(
            sample=sample,
            encoder_hidden_states=encoder_hidden_states,
            text_embeds=text_embeds,
            time_ids=time_ids,
            timestep_cond=timestep_cond,
        )
        embedding = self._embed(timesteps, text_embeds, time_ids, timestep_cond)
        context = encoder_hidden_states.astype(self.dtype)
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(sample)
        x, skips, seen = self._encode(x, embedding, context, residuals.adapter_features)
        if features:
            return seen
        x, skips = steered(x, skips, residuals)

        levels = len(config.block_out_channels)
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
