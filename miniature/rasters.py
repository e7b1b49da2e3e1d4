"""Pictures as arrays: WebP decoded, SVG rasterised, both on a white ground.

With opacity a in 0..1 and colour f, what is kept is a f + (1 - a): the composite on white. It is
taken before any resizing, since colours under zero opacity are arbitrary and would bleed in.
"""

import io
import re

import numpy as np
import resvg_py
from PIL import Image

SIZE = 128  # pixels, height and width of every stored picture
_OUTSIDE = re.compile(r"""<image|@import|href\s*=\s*["'](?!#)|url\(\s*["']?(?!#)""", re.IGNORECASE)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Lanczos resampling to a square.

    Args:
      image: `[h, w, 3]` uint8.
      size: pixels of the result's side.

    Returns:
      `[size, size, 3]` uint8.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def _on_white(picture: Image.Image) -> np.ndarray:
    rgba = picture.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(ground, rgba).convert("RGB"))


def from_webp(data: bytes, size: int = SIZE) -> np.ndarray:
    """Decodes a square WebP (or any format Pillow knows) onto white.

    Returns:
      `[size, size, 3]` uint8.

    Raises:
      ValueError: the bytes are not a picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return resize(_on_white(picture), size)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable picture ({error})") from error


def from_svg(body: str, box: tuple[float, float, float, float], size: int = SIZE) -> np.ndarray:
    """Rasterises an Iconify icon onto white, centred in a square.

    Args:
      body: SVG elements without the outer `<svg>`, as `icons.json` holds them.
      box: left, top, width, height of the icon, in its own units.
      size: pixels of the result's side.

    Returns:
      `[size, size, 3]` uint8.

    Raises:
      ValueError: the markup does not parse, or refers to anything outside itself.
    """
    if _OUTSIDE.search(body):
        raise ValueError("the SVG refers to something outside itself")
    left, top, width, height = box
    side = max(width, height)
    view = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{view}">{body}</svg>'
    )
    # System fonts would make the pictures depend on the machine (no icon holds text).
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    except ValueError as error:
        raise ValueError(f"the SVG does not parse ({error})") from error
    with Image.open(io.BytesIO(bytes(png))) as picture:
        return _on_white(picture)
