"""Pictures to draw on: how they are read, fitted to the model's size, and brought to latents."""

import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageOps

from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.product import Params
from tlcm_jax.io.image_size import Resolution

# A value from here on is white: diffusers' threshold of one half.
_WHITE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvas:
    """Pictures that images begin from, one for each prompt or one for all.

    Attributes:
      images: of the size that is drawn.
      masks: True where something new is drawn; None lets all change.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    masks: Bool[np.ndarray, "n h w"] | None = None

    def check(self, model: LatentModel, count: int, size: tuple[int, int]) -> None:
        """Raises a ValueError unless `count` images of `size`, (height, width), can be drawn."""
        if len(self.images) not in (1, count):
            raise ValueError(f"{len(self.images)} pictures for {count} prompts: give 1 or {count}")
        if self.images.shape[1:3] != size:
            height, width = self.images.shape[1:3]
            raise ValueError(
                f"the picture has {width}x{height} pixels, but {size[1]}x{size[0]} are drawn: "
                "fit it first (generation.canvas.fit)"
            )
        if self.masks is not None and self.masks.shape != self.images.shape[:3]:
            raise ValueError(
                f"masks of shape {self.masks.shape} for pictures of {self.images.shape[:3]}"
            )
        if model.needs_mask and self.masks is None:
            raise ValueError(_needs_mask(model))

    def rows(self, count: int) -> dict[str, np.ndarray]:
        """The arrays, a row for each of `count` prompts."""
        found = {"image": np.broadcast_to(self.images, (count, *self.images.shape[1:]))}
        if self.masks is not None:
            found["mask"] = np.broadcast_to(self.masks, (count, *self.masks.shape[1:]))
        return found


def check_canvas(
    model: LatentModel, canvas: Canvas | None, count: int, resolution: Resolution
) -> None:
    """Raises a ValueError where a model cannot draw on a canvas, or not without one."""
    if canvas is not None:
        canvas.check(model, count, model.image_size(resolution))
    elif model.needs_mask:
        raise ValueError(_needs_mask(model))


def _needs_mask(model: LatentModel) -> str:
    return (
        f"{model.source} is an inpainting model: it needs a picture and a mask (--image FILE "
        "--mask FILE)"
    )


@functools.partial(jax.jit, static_argnames="static")
def to_latents(
    static: Any, params: Params, rows: dict[str, Array]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w 1"] | None, Float[Array, "b h w c"] | None]:
    """A batch's pictures, their masks at the latents' resolution, and what the masks leave.

    Args:
      static: holds the `model`.
      params: of the model's encoder.
      rows: of `Canvas.rows`.

    Returns:
      Latents; the masks, each latent's that of its first pixel, as in diffusers; and latents of
      the pictures with grey where the mask is, for a model that `needs_mask`.
    """
    model, images = static.model, rows["image"].astype(jnp.float32) / 255
    latents = model.encode_images(images, params)
    if "mask" not in rows:
        return latents, None, None
    mask = rows["mask"][..., None].astype(jnp.float32)
    factor = images.shape[1] // latents.shape[1]
    left = None
    if model.needs_mask:
        left = model.encode_images(jnp.where(mask > 0, 0.5, images), params)
    return latents, mask[:, ::factor, ::factor], left


def read_picture(path: str | Path | io.BytesIO) -> Image.Image:
    """A picture file, or its content, as RGB, upright, on white where it is transparent.

    Raises:
      FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """A picture scaled to cover (height, width), and cut about its centre.

    Returns:
      The picture, and in words what was done; "" where nothing was.
    """
    height, width = size
    if image.size == (width, height):
        return image, ""
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    said = f"{image.width}x{image.height} pixels"
    if scaled != image.size:
        said += f" scaled to {scaled[0]}x{scaled[1]}"
    if scaled != (width, height):
        said += f", of which the middle {width}x{height} are taken"
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    resized = image.resize(scaled, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height)), said


def read_pictures(
    picture: str | Path | io.BytesIO, mask: str | Path | io.BytesIO | None
) -> tuple[Image.Image, Image.Image | None]:
    """A picture file, and a mask that is white where something new is to be drawn.

    Raises:
      FileNotFoundError, ValueError: a file that cannot be read, or a mask of another size or
        without anything white.
    """
    image = read_picture(picture)
    if mask is None:
        return image, None
    drawn = read_picture(mask).convert("L")
    if drawn.size != image.size:
        raise ValueError(
            f"the mask {mask} has {drawn.width}x{drawn.height} pixels and the picture "
            f"{image.width}x{image.height}: draw the mask on the picture, in its size"
        )
    if not np.any(np.asarray(drawn) >= _WHITE):
        raise ValueError(
            f"the mask {mask} has nothing white, which is where something new is drawn"
        )
    return image, drawn


def fit_canvas(
    image: Image.Image, mask: Image.Image | None, size: tuple[int, int]
) -> tuple[Canvas, str]:
    """What `read_pictures` gives as a canvas of (height, width), both cut alike.

    Returns:
      The canvas, and in words how the picture was fitted; "" where it fits.

    Raises:
      ValueError: what the mask opens is cut off.
    """
    fitted, said = fit(image, size)
    masks = None
    if mask is not None:
        masks = np.asarray(fit(mask, size)[0])[None] >= _WHITE
        if not masks.any():
            raise ValueError(
                f"all that the mask opens lies outside of what is drawn ({said}): take another "
                "resolution, or cut the picture and the mask yourself"
            )
    return Canvas(images=np.asarray(fitted)[None], masks=masks), said


def enlarge(images: UInt8[np.ndarray, "n h w 3"], size: tuple[int, int]) -> Canvas:
    """Images at another size, (height, width), as a canvas: Lanczos's filter."""
    height, width = size
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
        for image in images
    ]
    return Canvas(images=np.stack(resized))
