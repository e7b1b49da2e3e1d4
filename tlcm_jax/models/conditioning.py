"""What a denoiser is conditioned on, as one pytree, and what control networks make of it."""

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
      controls: what steers each control network, in their order; none without any.
      masked: `[b, h, w, 1 + c]` what a network for inpainting sees beside the noisy latents: a
        mask, 1 where something new is drawn, and latents of what it leaves; else None.
    """

    # Of any type: JAX rebuilds pytrees with shapes and shardings in the place of arrays.
    prompt_embeds: Any
    pooled: Any = None
    time_ids: Any = None
    guidance_scale: Any = None
    controls: tuple["ControlMap", ...] = ()
    masked: Any = None


@flax.struct.dataclass
class ControlMap:
    """What steers a control network.

    Attributes:
      image: `[b, h, w, c]` edges, depth or the like, in 0 .. 1, of the pictures' own size.
      scale: `[b]` what the network's residuals are multiplied by: 1 as it was trained, 0 for none.
    """

    image: Any
    scale: Any


@flax.struct.dataclass
class Residuals:
    """What control networks add to a UNet's states (`models.unet_encoder`).

    Attributes:
      down: of ControlNets, one for each skip; none without any.
      mid: of ControlNets, for the middle.
      adapter_features: of T2I-Adapters, for each block down, and then for the middle.
    """

    down: tuple[Any, ...] = ()
    mid: Any = None
    adapter_features: tuple[Any, ...] = ()

    def plus(self, other: "Residuals") -> "Residuals":
        """Those of two networks together.

        Raises:
          ValueError: they are of networks of unlike forms.
        """
        down, features = (
            _added(name, getattr(self, name), getattr(other, name))
            for name in ("down", "adapter_features")
        )
        mid = other.mid if self.mid is None else self.mid
        if self.mid is not None and other.mid is not None:
            mid = self.mid + other.mid
        return Residuals(down=down, mid=mid, adapter_features=features)


def _added(name: str, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
    if not first or not second:
        return first or second
    shapes = [tuple(state.shape for state in states) for states in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"two control networks have residuals ({name}) of unlike shapes")
    return tuple(a + b for a, b in zip(first, second, strict=True))
