"""Discriminator heads: small networks that read a UNet's states and say how real they look.

One head for each block looked at (adversarial consistency of PCM, Wang et al. 2024, arXiv
2405.18407: 1x1 convolutions, group norm, a residual). A head sees every place of its block's
states by itself, and gives a map of logits.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Conv, Dtype, group_norm


class Head(nn.Module):
    """Logits `[b, h, w, 1]` of states `[b, h, w, c]`.

    Attributes:
      groups: of the group norms; divides c.
    """

    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        def norm(name: str, x: Array) -> Array:
            return nn.silu(group_norm(self.groups, 1e-5, self.dtype, name)(x))

        def conv(name: str, features: int, x: Array) -> Array:
            return Conv(features, kernel_size=1, padding=0, dtype=self.dtype, name=name)(x)

        width = x.shape[-1]
        # The states' scale differs by block and grows with training: normalised first.
        x = conv("conv_in", width, norm("norm_in", x))
        x = x + conv("conv", width, norm("norm", x))
        return conv("conv_out", 1, norm("norm_out", x)).astype(jnp.float32)


class Heads(nn.Module):
    """A head for each of some blocks.

    Attributes:
      layers: names of the blocks.
      groups: of each head's group norms.
    """

    layers: tuple[str, ...]
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Array]) -> tuple[Array, ...]:
        return tuple(
            Head(self.groups, self.dtype, name=layer)(features[layer]) for layer in self.layers
        )


def choose_layers(layers: tuple[str, ...], known: Mapping[str, int]) -> tuple[str, ...]:
    """The blocks that heads look at: those named, or all.

    Args:
      layers: names; none takes all.
      known: widths of the blocks there are, by name (`unet.feature_widths`).

    Raises:
      ValueError: a name that there is not, or one given twice.
    """
    unknown = [layer for layer in layers if layer not in known]
    if unknown or len(set(layers)) < len(layers):
        wrong = f"no block is called {unknown}" if unknown else "a block is named twice"
        raise ValueError(f"layers = {layers}: {wrong}; this UNet has {', '.join(known)}")
    return layers or tuple(known)
