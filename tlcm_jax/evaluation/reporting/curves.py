"""Curves as inline SVG that follows the page's colours, light or dark."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tlcm_jax.evaluation.reporting.contents import Curve

# Drawn in these, then replaced by what the page's style sheet decides.
_THEMED = {
    "#010203": "currentColor",
    "#040506": "var(--rule)",
    "#070809": "var(--line)",
    "#0a0b0c": "var(--line-soft)",
}
_INK, _RULE, _LINE, _SOFT = _THEMED
_STYLE: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.color": _RULE,
    "ytick.labelcolor": _INK,
    "font.size": 9,
}


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of the finite values among `window` neighbours.

    Args:
        values: float [n].
        window: odd number of neighbours; fewer at the ends.

    Returns:
        float [n]; NaN where no neighbour is finite.
    """
    if not len(values):
        return values
    finite = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    count = np.convolve(finite.astype(float), ones, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def curve_svg(curve: Curve, identity: str) -> str:
    """Draws a curve.

    Args:
        curve: what to draw.
        identity: text that no other drawing of the page has; makes the ids in the SVG unique.

    Returns:
        An <svg> element without an XML head, scripts or links.
    """
    steps = np.asarray(curve.steps, dtype=float)
    values = np.asarray(curve.values, dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    if curve.log:
        values = np.where(values > 0, values, np.nan)
    # A point in forty at each side: enough to calm a per-step loss, and nothing for few points.
    window = 2 * (len(values) // 40) + 1
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": identity}):
        figure = Figure(figsize=(5.2, 2.5))
        canvas = FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0.1, 0.18, 0.87, 0.76))
        axes.patch.set_alpha(0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if window > 1:
            axes.plot(steps, values, color=_SOFT, linewidth=0.8)
        marker = "o" if len(values) < 12 else ""
        smooth = running_mean(values, window)
        axes.plot(steps, smooth, color=_LINE, linewidth=1.8, marker=marker, markersize=3)
        if curve.log and np.isfinite(values).any():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("step")
        if not np.isfinite(values).any():
            axes.text(
                0.5, 0.5, "no finite values", ha="center", va="center", transform=axes.transAxes
            )
        buffer = io.StringIO()
        canvas.print_figure(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for drawn, themed in _THEMED.items():
        svg = svg.replace(drawn, themed)
    return svg
