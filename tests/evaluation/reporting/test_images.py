"""Contact sheets: every picture in its place, whatever the text beside it."""

import numpy as np
import pytest
from PIL import Image

from tlcm_jax.evaluation.reporting.contents import ImageGrid, ImageRow
from tlcm_jax.evaluation.reporting.images import contact_sheet

RED, GREEN, BLUE, BLACK = ([255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0])


def flat(*colors) -> np.ndarray:
    return np.array(colors, np.uint8)[:, None, None, :].repeat(32, 1).repeat(32, 2)


def places(sheet: np.ndarray, color) -> tuple[slice, slice]:
    """The rows and columns that a colour fills."""
    found = (sheet == np.array(color)).all(-1)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def test_pictures_stand_by_prompt_and_sampler(tmp_path):
    grid = ImageGrid(
        "t",
        ["a red fox", "a " + "very " * 200 + "long prompt"],
        [ImageRow("1 step", flat(RED, GREEN)), ImageRow("25", flat(BLUE, BLACK), "teacher")],
    )
    contact_sheet(tmp_path / "sheet.png", grid, scale=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    red, green, blue, black = (places(sheet, c) for c in (RED, GREEN, BLUE, BLACK))
    assert all(s.stop - s.start == 128 for place in (red, green, blue, black) for s in place)
    assert red[0] == blue[0] and green[0] == black[0] and red[0].stop < green[0].start
    assert red[1] == green[1] and blue[1] == black[1] and red[1].stop < blue[1].start
    # The text keeps to its own column.
    left = sheet[:, : red[1].start]
    assert (left[red[0]] != 255).any() and (left[green[0]] != 255).any()
    assert (left[:, -4:] == 255).all()


def test_default_scale_makes_pictures_readable(tmp_path):
    contact_sheet(tmp_path / "s.png", ImageGrid("t", ["a"], [ImageRow("1", flat(RED))]))
    place = places(np.asarray(Image.open(tmp_path / "s.png")), RED)
    assert place[0].stop - place[0].start == 128


def test_one_size_only(tmp_path):
    rows = [ImageRow("1", flat(RED)), ImageRow("2", flat(RED)[:, :16])]
    with pytest.raises(ValueError, match=r"one size; got \[\(16, 32\), \(32, 32\)\]"):
        contact_sheet(tmp_path / "s.png", ImageGrid("t", ["a"], rows))


def test_scale_must_enlarge(tmp_path):
    with pytest.raises(ValueError, match="scale must be at least 1; got 0"):
        contact_sheet(
            tmp_path / "s.png", ImageGrid("t", ["a"], [ImageRow("1", flat(RED))]), scale=0
        )
