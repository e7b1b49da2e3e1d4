"""LPIPS of images: how different two look, by AlexNet's or VGG16's features (arXiv 1801.03924).

With f_l the features of stage l, scaled to unit length at each place, and w_l >= 0,

    d(a, b) = sum_l mean_{h, w} sum_c w_lc (f_l(a) - f_l(b))_hwc^2.              (1)

Version 0.1, whose inputs are normalised. Names are those of the package `lpips`.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Conv, Dense

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Of each stage: whether a max-pool comes first, and each convolution's place among torchvision's
# features, its width, its kernel's side, its stride and its padding.
STAGES = {
    "vgg": (
        (False, ((0, 64, 3, 1, 1), (2, 64, 3, 1, 1))),
        (True, ((5, 128, 3, 1, 1), (7, 128, 3, 1, 1))),
        (True, ((10, 256, 3, 1, 1), (12, 256, 3, 1, 1), (14, 256, 3, 1, 1))),
        (True, ((17, 512, 3, 1, 1), (19, 512, 3, 1, 1), (21, 512, 3, 1, 1))),
        (True, ((24, 512, 3, 1, 1), (26, 512, 3, 1, 1), (28, 512, 3, 1, 1))),
    ),
    "alex": (
        (False, ((0, 64, 11, 4, 2),)),
        (True, ((3, 192, 5, 1, 2),)),
        (True, ((6, 384, 3, 1, 1),)),
        (False, ((8, 256, 3, 1, 1),)),
        (False, ((10, 256, 3, 1, 1),)),
    ),
}
# AlexNet's pools overlap.
_POOL = {"vgg": 2, "alex": 3}


class LPIPS(nn.Module):
    """Equation (1): images in -1..1 twice, to `[b]`.

    Attributes:
      trunk: whose features; `alex` is what most report, `vgg` what losses use.
    """

    trunk: Literal["alex", "vgg"] = "alex"

    @nn.compact
    def __call__(
        self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        # One call, side by side, so that a sharded batch stays where it is.
        both = jnp.stack([a, b], axis=1)
        x = (both.reshape(-1, *a.shape[1:]) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        side = _POOL[self.trunk]
        total = jnp.zeros(len(a))
        for stage, (pooled, convolutions) in enumerate(STAGES[self.trunk]):
            if pooled:
                x = nn.max_pool(x, (side, side), strides=(2, 2))
            for place, width, kernel, stride, padding in convolutions:
                name = f"net.slice{stage + 1}.{place}"
                x = nn.relu(Conv(width, kernel, strides=stride, padding=padding, name=name)(x))
            # The root of a sum that may be 0 has no gradient there.
            length = jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-30))
            unit = (x / (length + 1e-10)).reshape(*both.shape[:2], *x.shape[1:])
            squares = jnp.square(unit[:, 0] - unit[:, 1])
            weighted = Dense(1, use_bias=False, name=f"lin{stage}.model.1")(squares)
            total = total + jnp.mean(weighted, axis=(1, 2, 3))
        return total
