"""Analysis by synthesis, for rungs with fills, contrasts and styles.

Stripes, outlines and pixels change what a component looks like more than its colour does, so the
parser draws the candidates with the renderer itself over the fitted ground g and keeps the one
with the least squared error inside the component's surroundings S:

    thing, style = argmin sum_{p in S} |draw(g, thing, style)(p) - image(p)|^2       (1)

First over style, colour, contrast, fill and phase for the best matching shape, with one style for
all components; then, that style fixed, over the other shapes and nearby radii.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from miniature.shapes.render import OPACITY, PALETTE, draw
from miniature.shapes.scene import Rung, Thing

Geometry = tuple[str, float, float, float, float]  # shape, radius, rotation, x, y
_PHASES = (0.0, 0.2, 0.4, 0.6, 0.8)
_COLOURS = 3  # that are drawn
_RADII = (-1.0, -0.5, 0.0, 0.5, 1.0)
_TONE = (1.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """A component, with what may explain it.

    Attributes:
      near: its surroundings, `[64, 64]`.
      core: its most contrasting half, `[64, 64]`.
      geometries: one for each shape that matches well, the best first.
    """

    near: np.ndarray
    core: np.ndarray
    geometries: Sequence[Geometry]


def explain(
    image: np.ndarray, plane: np.ndarray, regions: Sequence[Region], rung: Rung
) -> tuple[list[Thing], list[float], str]:
    """Equation (1).

    Returns:
      The object of each region, the share of its energy that is left unexplained, and the style.
    """
    tables = []
    for region in regions:
        colours = _likely_colours(image, plane, region, rung)
        table = {}
        for style in rung.styles:
            options = _options(region.geometries[:1], colours, rung)
            table[style] = _best(image, plane, region.near, options, style)
        tables.append(table)
    style = min(rung.styles, key=lambda name: sum(table[name][0] for table in tables))
    things, left = [], []
    for region, table in zip(regions, tables, strict=True):
        first = table[style][1]
        options = (
            dataclasses.replace(
                first, shape=shape, radius=radius + step, rotation=rotation, x=x, y=y, phase=phase
            )
            for shape, radius, rotation, x, y in region.geometries
            for step in _RADII
            for phase in (_PHASES if first.fill == "striped" else (0.0,))
        )
        error, thing = _best(image, plane, region.near, options, style)
        energy = ((image - plane)[region.near] ** 2).sum()
        things.append(thing)
        left.append(float(error / max(energy, 1e-9)))
    return things, left, style


def _best(
    image: np.ndarray, plane: np.ndarray, near: np.ndarray, options: Iterator[Thing], style: str
) -> tuple[float, Thing]:
    target, best = image[near], (np.inf, None)
    for thing in options:
        drawn = plane.copy()
        draw(drawn, thing, style)
        error = float(((drawn[near] - target) ** 2).sum())
        if error < best[0]:
            best = (error, thing)
    return best


def _options(geometries: Sequence[Geometry], colours: Sequence[str], rung: Rung) -> Iterator[Thing]:
    for (shape, radius, rotation, x, y), colour, contrast, fill in itertools.product(
        geometries, colours, rung.contrasts, rung.fills
    ):
        for phase in _PHASES if fill == "striped" else (0.0,):
            yield Thing(
                size=rung.sizes[0], contrast=contrast, fill=fill, colour=colour, shape=shape,
                x=x, y=y, radius=radius, rotation=rotation, tone=_TONE, phase=phase,
            )  # fmt: skip


def _likely_colours(image: np.ndarray, plane: np.ndarray, region: Region, rung: Rung) -> list[str]:
    """The palette colours nearest to the component's pixels, whatever contrast and fill."""
    pixels, behind = image[region.core], plane[region.core].mean(0)
    chroma = pixels.max(1) - pixels.min(1)
    seen = (np.median(pixels, 0), np.median(pixels[chroma >= np.quantile(chroma, 0.67)], 0))

    def distance(name: str) -> float:
        shown = (
            a * np.asarray(PALETTE[name]) + (1 - a) * behind
            for a in (OPACITY[c] for c in rung.contrasts)
        )
        return min(float(((x - y) ** 2).sum()) for x in shown for y in seen)

    return sorted(rung.colours, key=distance)[:_COLOURS]
