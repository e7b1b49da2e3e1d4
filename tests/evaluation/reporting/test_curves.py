"""Curves: the drawn line against the numbers it stands for."""

import re

import numpy as np
import pytest

from tlcm_jax.evaluation.reporting.contents import Curve
from tlcm_jax.evaluation.reporting.curves import curve_svg, running_mean


def line_points(svg: str, color: str) -> np.ndarray:
    """Vertices [n, 2] of the drawn line of a colour."""
    for path in re.findall(r"<path d=\"([^\"]*)\"[^>]*style=\"([^\"]*)\"", svg):
        if f"stroke: {color};" in path[1] and "stroke-linecap: square" in path[1]:
            return np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path[0]), dtype=float)
    raise AssertionError(f"no line in {color}")


def test_running_mean_ignores_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, 5.0, np.inf])
    np.testing.assert_allclose(running_mean(values, 3), [1, 2, 4, 4, 5], rtol=1e-12)
    assert np.isnan(running_mean(np.array([np.nan]), 1)).all()


def test_line_is_the_data():
    steps, values = [0, 10, 20, 30], [1.0, 3.0, 2.0, 5.0]
    x, y = line_points(curve_svg(Curve("s", "t", steps, values), "one"), "var(--line)").T
    # An affine image of the data, with the y axis pointing down.
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), np.array(steps) / 30, atol=1e-5)
    np.testing.assert_allclose((y[0] - y) / (y[0] - y[3]), (np.array(values) - 1) / 4, atol=1e-5)


def test_logarithmic_axis_draws_equal_ratios_equally():
    curve = Curve("s", "t", [0, 1, 2], [1.0, 0.1, 0.01], log=True)
    y = line_points(curve_svg(curve, "one"), "var(--line)")[:, 1]
    np.testing.assert_allclose(y[1] - y[0], y[2] - y[1], rtol=1e-5)


def test_many_points_are_also_drawn_smoothed():
    values = np.random.default_rng(0).normal(size=400)
    svg = curve_svg(Curve("s", "t", range(400), values), "one")
    raw, smooth = (line_points(svg, f"var(--{name})")[:, 1] for name in ("line-soft", "line"))
    assert smooth.std() < raw.std() / 3


@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [0.0, -1.0, -2.0]])
def test_nothing_to_draw_is_said(values):
    svg = curve_svg(Curve("s", "t", range(len(values)), values, log=True), "one")
    assert "no finite values" in svg


def test_drawing_is_reproducible_and_its_ids_are_its_own():
    curve = Curve("s", "t", [0, 1], [1.0, 2.0])
    assert curve_svg(curve, "one") == curve_svg(curve, "one")
    ids = [set(re.findall(r'id="([^"]+)"', curve_svg(curve, name))) for name in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]
