"""The judge's network: names the object and the style that a picture shows.

EfficientNet-lite0 features h (mean over space) name the object. What tells the styles apart at 32
pixels (gradients, outlines, palette) is gone from them, so the style is read from g, the mean and
the deviation over space of five earlier blocks' channels:

    object:  softmax_k( s <e, c_k> ),   e = normalise(W h + b),  c_k = normalise(class k)    (1)
    style:   softmax_j( (A g + a)_j )                                                        (2)

e has 128 dimensions, so that 1 914 classes with at most four pictures each share what they can.
"""

from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from miniature.efficientnet import EfficientNetLite0

STYLE_BLOCKS = (0, 2, 4, 7, 10)
"""The backbone's blocks that the style head reads: the last of each resolution, and one more."""


class JudgeNetwork(nn.Module):
    """Backbone and heads.

    Attributes:
      classes: number of objects.
      styles: number of styles.
      side: pixels that pictures are enlarged to before the backbone.
      width: dimensions of the object embedding.
      sharpness: the factor s of equation (1).
    """

    classes: int
    styles: int
    side: int = 96
    width: int = 128
    sharpness: float = 16.0

    @nn.compact
    def __call__(self, images: Array) -> "Outputs":
        """Features and logits of pictures.

        Args:
          images: `[b, h, w, 3]`, 0 to 1.
        """
        images = jax.image.resize(images, (len(images), self.side, self.side, 3), "bilinear")
        maps, blocks = EfficientNetLite0(name="backbone")(images)
        features, texture = maps.mean((1, 2)), _texture([blocks[i] for i in STYLE_BLOCKS])
        embedding = nn.Dense(self.width, name="embedding")(features)
        table = self.param("classes", nn.initializers.normal(1.0), (self.classes, self.width))
        cosine = normalise(embedding) @ normalise(table).T
        return Outputs(
            features=features,
            texture=texture,
            objects=self.sharpness * cosine,
            styles=nn.Dense(self.styles, name="style")(texture),
        )


@flax.struct.dataclass
class Outputs:
    """What the network says of b pictures.

    Attributes:
      features: `[b, 1280]`, h of equation (1).
      texture: `[b, 544]`, g of equation (2).
      objects: `[b, classes]` logits.
      styles: `[b, styles]` logits.
    """

    features: Array
    texture: Array
    objects: Array
    styles: Array


def _texture(maps: Sequence[Array]) -> Array:
    """Mean and deviation over space of every channel of some feature maps: `[b, 2 * channels]`."""
    deviations = [jnp.sqrt(x.var((1, 2)) + 1e-4) for x in maps]  # finite slope where constant
    return jnp.concatenate([x.mean((1, 2)) for x in maps] + deviations, -1)


def normalise(x: Array) -> Array:
    """Unit length along the last axis; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)
