"""Images for people: data URIs for the report, and contact sheets as PNG files."""

import base64
import io
import os
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from tlcm_jax.evaluation.reporting.contents import ImageGrid

# Larger images are reduced for the report: a hundred of 1024 px would make it 150 MB.
LARGEST_EMBEDDED = 384
_INK = "#1c1d20"
_COLORS = {
    "student": "#3457d5", "teacher": "#a35d00", "baseline": "#8a3ab9", "real": "#23764a",
}  # fmt: skip


def data_uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Encodes an image as a data URI that a browser draws without a request.

    Args:
        pixels: the image.

    Returns:
        "data:image/png;base64,..." exactly as given up to 64 px, else a WebP of at most
        `LARGEST_EMBEDDED` px.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    if max(image.size) <= 64:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LARGEST_EMBEDDED, LARGEST_EMBEDDED), Image.Resampling.LANCZOS)
        image.save(buffer, format="WEBP", quality=90)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings DejaVu Sans: Latin, Greek and Cyrillic on every machine.
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )


def _enlarged(pixels: UInt8[np.ndarray, "h w 3"], scale: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)


def contact_sheet(
    path: str | os.PathLike, grid: ImageGrid, *, scale: int | None = None, margin: int = 8
) -> None:
    """Writes a grid as one PNG: a row for each prompt, a column for each sampler.

    Args:
        path: file to write; a gs:// path where its file system is installed.
        grid: images of equal size.
        scale: whole factor by which images are enlarged; None: to about 128 px.
        margin: pixels between images.

    Raises:
        ValueError: the images differ in size, or the scale is not positive.
    """
    sizes = {np.shape(row.images)[1:3] for row in grid.rows}
    if len(sizes) > 1:
        raise ValueError(f"a contact sheet needs images of one size; got {sorted(sizes)}")
    height, width = next(iter(sizes))
    if scale is None:
        scale = max(1, round(128 / max(height, width)))
    if scale < 1:
        raise ValueError(f"scale must be at least 1; got {scale}")
    height, width = height * scale, width * scale

    text = _font(14)
    line = 18
    letters = 26  # a row
    lead = 230
    head = margin + 2 * line + margin // 2
    sheet = Image.new(
        "RGB",
        (
            lead + len(grid.rows) * (width + margin) + margin,
            head + len(grid.prompts) * (height + margin) + margin,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, row in enumerate(grid.rows):
        left = lead + column * (width + margin)
        middle = left + width // 2
        # A baseline's label begins with its name.
        named = row.label.split(", ", 1) if row.kind == "baseline" else ()
        heading, label = named if len(named) == 2 else (row.kind, row.label)
        room = max(6, width // 8)
        for down, words, colour in ((0, heading, _COLORS[row.kind]), (line, label, _INK)):
            words = textwrap.shorten(words, room, placeholder="…")
            draw.text((middle, margin + down), words, colour, font=text, anchor="mt")
        for index, pixels in enumerate(row.images):
            sheet.paste(_enlarged(pixels, scale), (left, head + index * (height + margin)))
    for index, prompt in enumerate(grid.prompts):
        lines = textwrap.wrap(prompt, letters) or [""]
        room = max(1, height // line)
        if len(lines) > room:
            lines = [*lines[: room - 1], textwrap.shorten(lines[room - 1], letters - 2) + " …"]
        middle = head + index * (height + margin) + height // 2
        for number, words in enumerate(lines):
            down = middle + (number - (len(lines) - 1) / 2) * line
            draw.text((margin * 2, down), words, _INK, font=text, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    epath.Path(path).write_bytes(buffer.getvalue())
