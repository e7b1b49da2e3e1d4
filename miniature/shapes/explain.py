"""Analysis by synthesis, for rungs with fills, contrasts and styles.

Stripes, outlines and pixels change what a component looks like more than its colour does, so the
parser draws the candidates with the renderer itself over the fitted ground g and keeps the one
with the least squared error inside the component's surroundings S:

    thing, style = argmin sum_{p in S} |draw(g, thing, style)(p) - image(p)|^2       (1)

First over style, colour, contrast, fill and phase for the best matching shape, with one style for
all components; then, that style fixed, over the other shapes, nearby radii and places, each
polished; then over colour and contrast once more.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from miniature.shapes.render import OPACITY, PALETTE, draw
from miniature.shapes.scene import Rung, Thing

Geometry = tuple[str, float, float, float, float]  # shape, radius, rotation, x, y
_PHASES = (0.0, 0.2, 0.4, 0.6, 0.8)
_COLOURS = 3  # that are drawn
_RADII = (-1.0, -0.5, 0.0, 0.5, 1.0)
_RIM = 1.25  # pixels by which an outline, dark on a dark ground, hides from the match
_ROUND = ("circle", "ring")  # their rotation shows in the stripes alone
_ROTATIONS = (-0.35, -0.175, 0.0, 0.175, 0.35)
_BRIGHTNESS = (0.88, 1.12)  # the renderer's
# Last, one quantity after the other, around the best of each shape.
_POLISH = (("phase", 0.1), ("x", 0.3), ("y", 0.3), ("radius", 0.3), ("rotation", 0.09))


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
        colours, tone = _likely_colours(image, plane, region, rung)
        table = {}
        for style in rung.styles:
            shape, radius, *rest = region.geometries[0]
            sizes = (radius, radius + _RIM) if style == "outlined" else (radius,)
            options = _options([(shape, size, *rest) for size in sizes], colours, rung, tone)
            table[style] = _best(image, plane, region.near, options, style)
        tables.append((table, colours, tone))
    style = min(rung.styles, key=lambda name: sum(table[name][0] for table, _, _ in tables))
    things, left = [], []
    for region, (table, colours, tone) in zip(regions, tables, strict=True):
        first = table[style][1]
        shapes = [geometry for geometry in region.geometries if geometry[0] != first.shape]
        # Pixel art leaves little of a place: half a pixel can move a whole block.
        moves = (-0.5, 0.0, 0.5) if style == "pixel art" else (0.0,)
        best = []
        for shape, radius, rotation, x, y in (_geometry(first), *shapes):
            options = (
                dataclasses.replace(
                    first,
                    shape=shape,
                    radius=radius + step,
                    rotation=turned,
                    x=x + dx,
                    y=y + dy,
                    phase=phase,
                )
                for step, dx, dy in itertools.product(_RADII, moves, moves)
                for turned, phase in _stripes(shape, rotation, first.fill)
            )
            coarse = _best(image, plane, region.near, options, style)
            best.append(_polished(image, plane, region.near, coarse, style))
        thing = min(best, key=lambda pair: pair[0])[1]
        # With the right shape and phase, colour and contrast once more.
        painted = (
            dataclasses.replace(
                thing,
                colour=colour,
                contrast=contrast,
                tone=(tone(colour, contrast, thing.fill), 0.0, 0.0, 0.0),
            )
            for colour, contrast in itertools.product(colours, rung.contrasts)
        )
        error, thing = _best(image, plane, region.near, painted, style)
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


def _polished(
    image: np.ndarray, plane: np.ndarray, near: np.ndarray, found: tuple[float, Thing], style: str
) -> tuple[float, Thing]:
    """The same object, each of its quantities moved a little where that helps."""
    for name, step in _POLISH:
        if name == "phase" and found[1].fill != "striped":
            continue
        value = getattr(found[1], name)
        moved = [dataclasses.replace(found[1], **{name: value + s}) for s in (-step, step)]
        found = min(found, _best(image, plane, near, iter(moved), style), key=lambda pair: pair[0])
    return found


def _options(
    geometries: Sequence[Geometry],
    colours: Sequence[str],
    rung: Rung,
    tone: Callable[[str, str, str], float],
) -> Iterator[Thing]:
    for (shape, radius, rotation, x, y), colour, contrast, fill in itertools.product(
        geometries, colours, rung.contrasts, rung.fills
    ):
        shade = (tone(colour, contrast, fill), 0.0, 0.0, 0.0)
        for turned, phase in _stripes(shape, rotation, fill):
            yield Thing(
                size=rung.sizes[0], contrast=contrast, fill=fill, colour=colour, shape=shape,
                x=x, y=y, radius=radius, rotation=turned, tone=shade, phase=phase,
            )  # fmt: skip


def _geometry(thing: Thing) -> Geometry:
    return (thing.shape, thing.radius, thing.rotation, thing.x, thing.y)


def _stripes(shape: str, rotation: float, fill: str) -> list[tuple[float, float]]:
    """Rotations and phases to try."""
    if fill != "striped":
        return [(rotation, 0.0)]
    return list(itertools.product(_ROTATIONS if shape in _ROUND else (rotation,), _PHASES))


def _likely_colours(
    image: np.ndarray, plane: np.ndarray, region: Region, rung: Rung
) -> tuple[list[str], Callable[[str, str, str], float]]:
    """The palette colours nearest to the component's pixels, whatever contrast and fill; and the
    brightness, a function of colour, contrast and fill, with which each comes nearest.
    """  # noqa: D205
    pixels, behind = image[region.core], plane[region.core].mean(0)
    chroma = pixels.max(1) - pixels.min(1)
    # Bright stripes are the colour mixed with white: the most coloured third is the colour.
    vivid = pixels[chroma >= np.quantile(chroma, 0.67)]
    seen = {"plain": np.median(pixels, 0), "striped": np.median(vivid, 0)}

    def tone(colour: str, contrast: str, fill: str) -> float:
        opacity, pure = OPACITY[contrast], np.asarray(PALETTE[colour])
        own = (seen[fill] - (1 - opacity) * behind) / opacity
        return float(np.clip(own @ pure / (pure @ pure), *_BRIGHTNESS))

    def distance(colour: str) -> float:
        found = []
        for contrast, fill in itertools.product(rung.contrasts, rung.fills):
            opacity = OPACITY[contrast]
            shown = opacity * tone(colour, contrast, fill) * np.asarray(PALETTE[colour])
            found.append(((shown + (1 - opacity) * behind - seen[fill]) ** 2).sum())
        return float(min(found))

    return sorted(rung.colours, key=distance)[:_COLOURS], tone
