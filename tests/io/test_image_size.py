"""Sizes of images as people give them."""

import pytest

from tlcm_jax.io.image_size import ImageSize

WIDE = ImageSize(height=832, width=1216)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("1216x832", WIDE),
        (WIDE, WIDE),
        ("64", ImageSize(height=64, width=64)),
        (64, ImageSize(height=64, width=64)),
        (0, None),
        ("0", None),
        (None, None),
    ],
)
def test_text_is_width_first_and_one_number_a_square(given, size):
    assert ImageSize.read(given) == size
    if size is not None:
        assert ImageSize.read(str(size)) == size


@pytest.mark.parametrize(
    "given", ["1216x", "x832", "1216X832", "1216 x 832", "12.5", "-64", -64, True, "0x64", (64, 32)]
)
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ValueError, match="resolution .*(WIDTHxHEIGHT|at least 1)"):
        ImageSize.read(given)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [("1216x830", "1216x832"), ("1212x832", "1216x832"), ("3x3", "8"), ("1023", "1024")],
)
def test_what_is_no_multiple_is_refused_with_the_nearest_that_is(size, nearest):
    with pytest.raises(ValueError, match=f"resolution .* multiple of 8: the nearest is {nearest}$"):
        ImageSize.read(size).check(8)
    ImageSize.read(nearest).check(8)
