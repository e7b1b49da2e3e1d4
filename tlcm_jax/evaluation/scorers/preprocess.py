"""From images to the pixels that a scorer's network reads: resized, cut or padded, normalised.

On the host with Pillow, exactly as the references do it, for scores; on the device with the same
kernel, differentiable, for the preference term. Pillow rounds to 8 bits after each of its two
passes and the device does not: on 8 random images of odd sizes the two differ by 0.27 of 255 on
average and by 1.1 at most (`pytest -s tests/evaluation/scorers/test_preprocess.py -k differ`).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What a scorer does to an image first; bicubic, with antialiasing.

    Attributes:
      size: side of the result in pixels.
      fit: `crop` brings the shorter side to `size` and cuts the middle out, `pad` the longer one
        and adds black around, `squash` both.
      floor: the middle is cut as transformers does it, (n - size) // 2, and not as torchvision,
        which rounds halves to even.
      mean: of each channel, subtracted.
      std: of each channel, divided by.
    """

    size: int = 224
    fit: Literal["crop", "pad", "squash"] = "crop"
    floor: bool = False
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def on_host(self, images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n s s 3"]:
        """Resized with Pillow, as torchvision's transforms and the scorers' own do it."""
        height, width = self._resized(images.shape[1], images.shape[2])
        if (height, width) != images.shape[1:3]:
            images = np.stack([_pillow(image, height, width) for image in images])
        return self._fitted(images)

    def on_device(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n s s 3"]:
        """Resized differentiably; images that have the size already are left as they are."""
        height, width = self._resized(images.shape[1], images.shape[2])
        if (height, width) != images.shape[1:3]:
            # Across, then down, each clipped: Pillow's order, but where one side grows and the
            # other shrinks, which only `squash` can ask for.
            for shape in ((images.shape[1], width), (height, width)):
                images = jax.image.resize(images, (len(images), *shape, 3), "cubic", antialias=True)
                images = jnp.clip(images, 0, 1)
        return self._fitted(images)

    def pixels(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n s s 3"]:
        """What the network reads of images in 0..1 of any size."""
        images = self.on_device(jnp.asarray(images))
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "pad":
            scale = self.size / max(height, width)
            return round(height * scale), round(width * scale)
        if self.fit == "squash":
            return self.size, self.size
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    def _fitted(self, images):
        """The middle `size` x `size`, with black around it where there is less."""
        height, width = images.shape[1:3]
        if self.fit == "pad":
            top, left = (self.size - height) // 2, (self.size - width) // 2
            around = ((top, self.size - height - top), (left, self.size - width - left))
            pad = np.pad if isinstance(images, np.ndarray) else jnp.pad
            return pad(images, ((0, 0), *around, (0, 0)))
        middle = (lambda n: n // 2) if self.floor else (lambda n: round(n / 2))
        top, left = middle(height - self.size), middle(width - self.size)
        return images[:, top : top + self.size, left : left + self.size]


def _pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
