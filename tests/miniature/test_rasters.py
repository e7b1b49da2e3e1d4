"""Icons as pictures: WebP and SVG on white, and SVG that reaches outside itself."""

import numpy as np
import pytest

from miniature import rasters
from tests.support.icons import SQUARE, half_red, webp


def test_webp_is_composited_on_white_before_resizing():
    image = rasters.from_webp(half_red())
    # Lanczos reaches three pixels to either side of the edge at column 64.
    assert (image[:, :61] == (255, 0, 0)).all() and (image[:, 67:] == 255).all()
    # Red fades into white there: the hidden green never darkens the red channel.
    assert (image[..., 0] == 255).all()


def test_webp_half_opacity():
    pixels = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert np.abs(rasters.from_webp(webp(pixels), 8).astype(int) - 127).max() <= 1


def test_svg_is_on_white_and_centred():
    image = rasters.from_svg(SQUARE.format(32), (0, 0, 32, 64))
    # 32 x 64 in a square of 64: 16 units, 32 pixels of margin left and right, blue in the top half.
    assert (image[:, :32] == 255).all() and (image[:, 96:] == 255).all()
    assert (image[:64, 32:96] == (0, 0, 255)).all()
    assert (image[64:, 32:96] == 255).all()


def test_svg_half_opacity_and_offset():
    body = '<path fill="#000" fill-opacity=".5" d="M10 10h4v4h-4z"/>'
    image = rasters.from_svg(body, (10, 10, 4, 4), 16)
    assert np.abs(image.astype(int) - 127).max() <= 1


def test_svg_own_references_are_allowed():
    body = '<linearGradient id="g"><stop stop-color="#f00"/></linearGradient>'
    image = rasters.from_svg(body + '<path fill="url(#g)" d="M0 0h8v8H0z"/>', (0, 0, 8, 8), 8)
    assert (image == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "body",
    [
        '<image href="/a.png"/>',
        '<use xlink:href="file.svg#a"/>',
        '<path fill="url(http://a/b)" d="M0 0h8v8H0z"/>',
        "<style>@import 'a.css'</style>",
    ],
)
def test_svg_outside_references_are_refused(body):
    with pytest.raises(ValueError, match="outside itself"):
        rasters.from_svg(body, (0, 0, 8, 8))
