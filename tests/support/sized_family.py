"""The toy family with images of any size: a latent for each 4 x 4 pixels, and the size is told.

register()                        # in the toy's place in the table
"""

import dataclasses

import jax.numpy as jnp

from tests.support.toy_family import KIND, LATENT, NETWORKS, SIDE, ToyFlow
from tlcm_jax.families import load
from tlcm_jax.io.image_size import ImageSize


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SizedFlow(ToyFlow):
    """Each latent by itself, given the text and the image's height and width."""

    @property
    def size(self):
        return ImageSize(height=SIDE, width=SIDE)

    def latent_shape(self, resolution=None):
        size = ImageSize.read(resolution) or self.size
        size.check(4)
        return (size.height // 4, size.width // 4, LATENT)

    def encode_tokens(self, params, ids, resolution=None):
        text = super().encode_tokens(params, ids)["text"]
        size = ImageSize.read(resolution) or self.size
        told = jnp.array([[size.height, size.width]], jnp.float32)
        return {"text": text, "size": jnp.broadcast_to(told, (len(text), 2))}

    def null_of(self, null, conditioning):
        return conditioning | {"text": null["text"]}

    def predict(self, params, z, t, conditioning, lora=None, features=False, controls=()):
        places = z.shape[1] * z.shape[2]
        text = conditioning["text"].at[:, :2].add(conditioning["size"] / 10)
        every = [jnp.repeat(each, places, axis=0) for each in (t, text)]
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        found = NETWORKS["velocity"].apply(variables, z.reshape(-1, LATENT), *every)
        return found.reshape(z.shape)


def register() -> None:
    """The family's line in the table."""
    load.FAMILIES[KIND] = f"{__name__}:SizedFlow"
