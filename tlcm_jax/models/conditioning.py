"""What a denoiser is conditioned on, as one pytree."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Conditioning:
    """Text conditioning of a UNet; every array has a leading batch axis.

    Attributes:
      prompt_embeds: `[b, n, d]` token states, concatenated over the text encoders.
      pooled: `[b, p]` pooled embedding of the text encoder with projection; None where the
        model has none (SD 1.x, 2.x).
      time_ids: `[b, 6]` SDXL micro-conditioning: original height and width, crop top and left,
        target height and width, in pixels; None where the model has none.
      guidance_scale: `[b]` the scale that a network with guidance embedding (LCM's
        `time_cond_proj_dim`) is to draw as if guided by; None where the model has none.
    """

    # Of any type: JAX rebuilds pytrees with shapes and shardings in the place of arrays.
    prompt_embeds: Any
    pooled: Any = None
    time_ids: Any = None
    guidance_scale: Any = None
