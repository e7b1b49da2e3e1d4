"""The half of the UNet that goes down: what `UNet2DConditionModel` and `ControlNetModel` share.

Where control networks add to it is here too (Zhang et al. 2023, arXiv 2302.05543; Mou et al. 2023,
arXiv 2302.08453). With s_k the skips in their order and m the middle's state,

    s_k <- s_k + r_k,    m <- m + r_m              a ControlNet's residuals,       (1)
    x_i <- x_i + f_i                               a T2I-Adapter's features,       (2)

where x_i is the state at the end of block i, of its last transformer, or, in a block without any,
of the whole block. (1) is added for the way up alone; what comes after x_i on the way down sees (2)
as well.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.models.conditioning import Residuals
from tlcm_jax.models.embeddings import TimestepEmbedding, sinusoidal
from tlcm_jax.models.layers import Dtype
from tlcm_jax.models.unet_blocks import DownBlock, MidBlock, plus
from tlcm_jax.models.unet_config import UNetConfig


class UNetEncoder(nn.Module):
    """Embeddings, blocks down and the middle; the networks made of them name their own input.

    Attributes:
      config: the architecture.
      dtype: compute dtype; norms keep fp32 statistics whatever it is.
      remat: what the backward pass recomputes: `"none"`; each transformer block, but for its
        attentions' results (`"attention"`) or with them (`"blocks"`); each resnet too (`"all"`).
      kind: what messages call the network.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: str = "none"
    kind: ClassVar[str]

    @nn.nowrap
    def example(self) -> tuple[Any, ...]:
        """Inputs to trace the initialisation with."""
        config = self.config
        text_time: tuple[Array | None, Array | None] = (None, None)
        if config.text_time:
            ids = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - ids
            text_time = (jnp.zeros((1, pooled)), jnp.zeros((1, 6)))
        return (
            jnp.zeros((1, 16, 16, config.in_channels)),
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, 8, config.cross_attention_dim)),
            *text_time,
        )

    def _encode(
        self,
        x: Float[Array, "b h w c"],
        embedding: Float[Array, "b d"],
        context: Float[Array, "b m e"],
        adapter_features: tuple[Float[Array, "b _h _w _c"], ...] = (),
    ) -> tuple[Array, list[Array], dict[str, Array]]:
        """The blocks down and the middle, with equation (2).

        Args:
          x: what `conv_in` made.
          embedding: of the time.
          context: text states.
          adapter_features: of T2I-Adapters, for block 0, 1, ..., and the middle after the last.

        Returns:
          The middle's state, all skips, and the state at the end of each block by its name.
        """
        config = self.config
        levels = len(config.block_out_channels)
        skips, seen = [x], {}
        for i in range(levels):
            block = DownBlock(
                **self._block(i, config.down_block_types[i], config.transformer_layers[i]),
                layers=config.layers_per_block[i],
                add_downsample=i < levels - 1,
                name=f"down_blocks.{i}",
            )
            added = adapter_features[i] if i < len(adapter_features) else None
            x, states = block(x, embedding, context, added)
            skips += states
            seen[f"down_blocks.{i}"] = states[config.layers_per_block[i] - 1]
        if config.mid_block_type is not None:
            mid = self._block(levels - 1, "CrossAttn", (config.mid_transformer_layers,))
            pairs = 1 if config.mid_block_type == "UNetMidBlock2DCrossAttn" else 0
            x = MidBlock(**mid, layers=pairs, name="mid_block")(x, embedding, context)
            if len(adapter_features) > levels:
                x = plus(x, adapter_features[levels])
            seen["mid_block"] = x
        return x, skips, seen

    def _block(self, level: int, kind: str, depths: tuple[int, ...]) -> dict:
        """Arguments that a down, middle and up block of one level share."""
        config = self.config
        channels = config.block_out_channels[level]
        heads = config.num_attention_heads[level]
        transformer = dict(
            heads=heads,
            head_dim=channels // heads,
            linear_projection=config.use_linear_projection,
            remat=self.remat,
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

    def _check(self, **inputs: Array | None) -> None:
        """Refuses inputs that do not fit the config, by name."""
        config, kind = self.config, self.kind
        pooled, time_ids = inputs.pop("text_embeds"), inputs.pop("time_ids")
        if config.text_time and (pooled is None or time_ids is None):
            raise ValueError(f"this {kind} needs text_embeds and time_ids (text_time conditioning)")
        wanted: Mapping[str, int | None] = {
            "sample": config.in_channels,
            "encoder_hidden_states": config.cross_attention_dim,
            "timestep_cond": config.time_cond_proj_dim,
        }
        widths = {name: (array, wanted[name]) for name, array in inputs.items()}
        if config.text_time and pooled is not None and time_ids is not None:
            ids = time_ids.shape[-1] * config.addition_time_embed_dim
            widths["text_embeds"] = (pooled, config.projection_class_embeddings_input_dim - ids)
        for name, (array, width) in widths.items():
            given = None if array is None else array.shape[-1]
            if given != width:
                raise ValueError(f"this {kind} takes {name} of width {width}, got {given}")

    def _embed(
        self,
        timesteps: Num[Array, " b"],
        text_embeds: Float[Array, "b p"] | None,
        time_ids: Float[Array, "b ids"] | None,
        timestep_cond: Float[Array, "b g"] | None = None,
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


def steered(
    x: Float[Array, "b h w c"], skips: list[Array], residuals: Residuals
) -> tuple[Float[Array, "b h w c"], list[Array]]:
    """Equation (1).

    Args:
      x: the middle's state.
      skips: in the order they were made.
      residuals: a ControlNet's, or the sum of several's.

    Raises:
      ValueError: residuals of another number or shapes: of a network made for another UNet.
    """
    if not residuals.down:
        return x, skips
    given = [residual.shape for residual in (*residuals.down, residuals.mid)]
    wanted = [state.shape for state in (*skips, x)]
    if given != wanted:
        odd = next((pair for pair in zip(given, wanted, strict=False) if pair[0] != pair[1]), None)
        shown = f"{len(given)} for {len(wanted)}" if odd is None else f"{odd[0]} for {odd[1]}"
        raise ValueError(f"a ControlNet's residuals do not fit this UNet's states: {shown}")
    down = [skip + residual for skip, residual in zip(skips, residuals.down, strict=True)]
    return x + residuals.mid, down
