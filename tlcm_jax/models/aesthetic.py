"""LAION's aesthetic predictors: an affine map of CLIP's unit vector of an image.

    v2 (sac+logos+ava1):  s = W5 (W4 (... u + b1 ...) + b4) + b5       768-1024-128-64-16-1    (1)
    v1 (sa_0_4):          s = w u + b                                                          (2)

v2 is kept in the layers it was trained in, for its files have them so.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from tlcm_jax.models.layers import Dense

# The places of the layers among the published Sequential's, between dropouts.
_LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


class LinearChain(nn.Module):
    """Equation (1): `[b, d]` to `[b]`; ImageReward's head has the same layers."""

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, " b"]:
        for i, width in _LAYERS.items():
            x = Dense(width, name=f"layers.{i}")(x)
        return x[:, 0]


class AestheticV1(nn.Module):
    """Equation (2): `[b, d]` to `[b]`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, " b"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1))
        return (x @ kernel)[:, 0] + self.param("bias", nn.initializers.zeros_init(), (1,))[0]
