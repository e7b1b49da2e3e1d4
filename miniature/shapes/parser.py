"""The judge by construction: reads the objects back from a picture, or finds it malformed.

The background is fitted robustly (a plane, and the lines of a grid), what differs from it falls
into connected components, and each component is matched against the renderer's own shapes in all
sizes, rotations, sub-pixel places and two blurs. Coverage, what the templates are compared with,
is the residual e projected on the object's own colour u,

    c = (e . u) / (u . u),   match = max_T  <c, T> / (|c| |T|)                  (1)

and, where stripes or an outline make the colour uneven, |e| cut off at a quarter of its height;
there `explain` decides between the candidates.
It is deterministic, and has no weights and no gradient.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from miniature.shapes.explain import Geometry, Region, explain
from miniature.shapes.render import PALETTE, mask
from miniature.shapes.scene import SHAPES, SIDE, Rung, Spec, Thing, answered

_CROP = 28
_EIGHT = np.ones((3, 3))
_CENTRES = (np.arange(SIDE) + 0.5) / SIDE - 0.5
_PLANE = np.stack(
    [np.ones(SIDE**2), np.tile(_CENTRES, SIDE), np.repeat(_CENTRES, SIDE)], axis=1
)  # 1, x, y
_SMALLEST = 10  # pixels: less is a speck, which no threshold of contrast lets pass as an object
_LARGE_FROM = 7.75  # radius, pixels: between the sizes 12 to 14 and 17 to 20 across
_CONTRAST = 0.10  # of a pixel's residual, to belong to an object
_FAINT_CONTRAST = 0.055
_MATCH = 0.88  # below: malformed; real renders, decoded, seldom lie below 0.94
_UNEXPLAINED = 0.35  # of an object's energy, where equation (1) of `explain` decides
_SHAPES = 5  # candidates of a component


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """One object as the parser reads it; `match` is equation (1)."""

    size: str
    contrast: str
    fill: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    match: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parse:
    """What a picture holds.

    Attributes:
      objects: in no order.
      malformed: why the picture is none of this world's; empty if it is one.
    """

    objects: tuple[Found, ...]
    style: str
    ground: str
    malformed: str = ""


def _checked(image: np.ndarray) -> Float[np.ndarray, "64 64 3"]:
    if image.ndim == 2 or image.shape[-1] == 1:
        raise ValueError(f"parser: a greyscale picture {image.shape}; convert it to RGB")
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(f"parser: a picture of {image.shape}; this world's are {(SIDE, SIDE, 3)}")
    if image.dtype == np.uint8:
        return image / 255.0
    if not np.all(np.isfinite(image)) or image.min() < -0.01 or image.max() > 1.01:
        raise ValueError("parser: pixels must be uint8, or floats in 0..1")
    return image.astype(np.float64)


@functools.cache
def _bank() -> tuple[list[tuple], np.ndarray, np.ndarray]:
    """(shape, radius, rotation, dx, dy) of each template, and both kinds of templates."""
    kinds, soft = [], []
    for shape in SHAPES:
        swing = 0.5 if shape == "moon" else 0.35
        for radius in np.arange(5.25, 10.6, 0.5):
            for rotation in np.linspace(-swing, swing, 5):
                for dx, dy in itertools.product((0, 0.5), repeat=2):
                    box, share = mask(shape, SIDE / 2 + dx, SIDE / 2 + dy, radius, rotation)
                    whole = np.zeros((SIDE, SIDE))
                    whole[box] = share
                    for blur in (0.3, 0.9):
                        low = SIDE // 2 - _CROP // 2
                        cut = ndimage.gaussian_filter(whole, blur)[low : low + _CROP,
                                                                   low : low + _CROP]  # fmt: skip
                        kinds.append((shape, radius, rotation, dx, dy))
                        soft.append(cut.ravel())
    templates = np.array(soft, np.float32)
    full = np.clip(templates / 0.25, 0, 1)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return kinds, unit(templates), unit(full)


def _fit_plane(image: np.ndarray) -> np.ndarray:
    """Level and slopes `[3, 3]` of each channel, from the half of the pixels that fits best."""
    flat = image.reshape(-1, 3)
    keep = np.ones(len(flat), bool)
    for _ in range(5):
        plane = _PLANE[keep]
        fit = np.linalg.solve(plane.T @ plane, plane.T @ flat[keep])
        error = np.abs(flat - _PLANE @ fit).max(1)
        keep = error < max(0.05, np.quantile(error, 0.5))
    return fit


def _background(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """The fitted background `[64, 64, 3]`, its mean colour, and whether a grid lies on it."""
    fit = _fit_plane(image)
    rest = (image - (_PLANE @ fit).reshape(image.shape)).mean(-1)
    folded = []
    for axis in (0, 1):
        profile = np.median(rest, axis=axis)
        line = np.median(profile.reshape(8, 8), axis=0)  # by the phase of a period of 8
        folded.append(np.tile(np.minimum(line - np.median(line), 0), 8))
    grid = all(line.min() < -0.03 for line in folded)
    lines = np.zeros(image.shape)
    if grid:
        lines += (folded[0][None, :] + folded[1][:, None])[..., None]
        fit = _fit_plane(image - lines)
    return (_PLANE @ fit).reshape(image.shape) + lines, fit[0], grid


def _ground(level: np.ndarray, grid: bool) -> str:
    if level.mean() < 0.45:
        return "dark"
    if grid:
        return "grid"
    return "white" if level.mean() > 0.945 else "tinted"


def parse(image: np.ndarray, rung: Rung) -> Parse:
    """Reads a picture.

    Args:
      image: `[64, 64, 3]`, uint8 or floats in 0..1.
      rung: whose values the attributes can take.

    Raises:
      ValueError: the picture is greyscale, of another size, or its pixels out of range.
    """
    image = _checked(image)
    plane, level, grid = _background(image)
    error = image - plane
    strength = np.abs(error).max(-1)
    threshold = _FAINT_CONTRAST if "faint" in rung.contrasts else _CONTRAST
    drawn = strength > threshold
    # A stripe may look like the ground: parts two pixels apart are one object.
    joined = ndimage.binary_dilation(drawn, _EIGHT) if "striped" in rung.fills else drawn
    labels, count = ndimage.label(joined, _EIGHT)
    labels = np.where(drawn, labels, 0)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    ground = _ground(level, grid) if len(rung.grounds) > 1 else rung.grounds[0]
    regions, matches, malformed = [], [], ""
    for label in np.argsort(-areas)[:8] + 1:
        here = labels == label
        if areas[label - 1] < _SMALLEST:
            # Faint specks are the decoder's; a strong one is a thing that should not be there.
            if areas[label - 1] >= 4 and strength[here].max() > 0.35:
                malformed = "speck"
            continue
        region = _region(error, strength, labels, here, rung)
        if region is None:
            malformed = "blob"
            continue
        regions.append(region[0])
        matches.append(region[1])
    style = rung.styles[0]
    if _plain(rung):
        things = [_flat(image, plane, region, rung) for region in regions]
        failed = [match < _MATCH for match in matches]
    else:
        styles = ("pixel art",) if _blocky(image, plane, regions) else rung.styles
        explained = dataclasses.replace(rung, styles=styles)
        things, left, style = explain(image, plane, regions, explained)
        failed = [share > _UNEXPLAINED for share in left]
    if any(failed):
        malformed = "shape"
    found = tuple(
        Found(
            **{a: getattr(thing, a) for a in ("contrast", "fill", "colour", "shape")},
            **{a: getattr(thing, a) for a in ("x", "y", "radius")},
            size="large" if thing.radius > _LARGE_FROM else "small",
            match=match,
        )
        for thing, match in zip(things, matches, strict=True)
    )
    return Parse(objects=found, style=style, ground=ground, malformed=malformed)


def foreground(image: np.ndarray) -> Bool[np.ndarray, "64 64"]:
    """The pixels that stand out of a picture's ground, as bold objects do; arguments as `parse`'s.

    Raises:
      ValueError: as `parse`.
    """
    image = _checked(image)
    return np.abs(image - _background(image)[0]).max(-1) > _CONTRAST


def _blocky(image: np.ndarray, plane: np.ndarray, regions: Sequence[Region]) -> bool:
    """Whether all that was drawn is made of constant 2 x 2 blocks: pixel art, and nothing else."""
    if not regions:
        return False

    def spread(picture: np.ndarray) -> np.ndarray:
        return np.ptp(picture.reshape(SIDE // 2, 2, SIDE // 2, 2, 3), axis=(1, 3)).max(-1)

    touched = np.any([region.near for region in regions], axis=0)
    touched = touched.reshape(SIDE // 2, 2, SIDE // 2, 2).any((1, 3))
    touched &= spread(plane) < 0.03  # a grid's lines lie where they like
    return bool(np.mean(spread(image)[touched] < 0.04) > 0.8)


def _plain(rung: Rung) -> bool:
    """Whether an object is its colour all over, so that equation (1) says everything."""
    return max(len(rung.fills), len(rung.contrasts), len(rung.styles)) == 1


def _region(
    error: np.ndarray, strength: np.ndarray, labels: np.ndarray, here: np.ndarray, rung: Rung
) -> tuple[Region, float] | None:
    """One component with the shapes that match it, and the best match; None if it is too large."""
    rows, columns = np.flatnonzero(here.any(1)), np.flatnonzero(here.any(0))
    if max(np.ptp(rows), np.ptp(columns)) > _CROP:
        return None
    core = here & (strength >= np.quantile(strength[here], 0.5))
    unit = np.median(error[core], axis=0)
    near = ndimage.binary_dilation(here, _EIGHT, 2) & (here | (labels == 0))
    projected = np.where(near, np.clip(error @ unit / (unit @ unit + 1e-9), -0.1, 1.1), 0)
    centre = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    kinds, soft, full = _bank()
    fields = [(projected, soft)]
    if not _plain(rung):
        height = 0.25 * np.quantile(strength[here], 0.9)
        fields.append((np.where(near, np.clip(strength / height, 0, 1), 0), full))
    best: dict[str, tuple[float, Geometry]] = {}
    for field, bank in fields:
        shifts, crops = _crops(field, centre)
        scores = bank @ crops
        column = scores.argmax(1)
        scores = scores[np.arange(len(scores)), column]
        for shape, rows_of in _rows().items():
            row = rows_of[scores[rows_of].argmax()]
            _, radius, rotation, dx, dy = kinds[row]
            y, x = shifts[column[row]]
            geometry = (shape, float(radius), float(rotation), x + dx, y + dy)
            best[shape] = max(best.get(shape, (-1.0, geometry)), (float(scores[row]), geometry))
    ranked = sorted(best.values(), reverse=True)
    geometries = [geometry for _, geometry in ranked[:_SHAPES]]
    return Region(near=near, core=core, geometries=geometries), ranked[0][0]


def _flat(image: np.ndarray, plane: np.ndarray, region: Region, rung: Rung) -> Thing:
    """The object of a region in a rung without fills, contrasts and styles."""
    shape, radius, rotation, x, y = region.geometries[0]
    inner = region.core & ndimage.binary_erosion(region.near, _EIGHT, 3)
    inner = inner if inner.sum() >= 6 else region.core
    return Thing(
        size=rung.sizes[0], contrast=rung.contrasts[0], fill=rung.fills[0], shape=shape,
        colour=_colour(image[inner], rung), x=x, y=y, radius=radius, rotation=rotation,
        tone=(1.0, 0.0, 0.0, 0.0), phase=0.0,
    )  # fmt: skip


def _colour(pixels: np.ndarray, rung: Rung) -> str:
    """The nearest palette colour; the renderer's brightness is free by 12 %, so hue decides."""
    seen = np.median(pixels, axis=0)

    def distance(name: str) -> float:
        shown = np.clip(np.outer((0.9, 1.0, 1.1), PALETTE[name]), 0, 1)
        return float(((shown - seen) ** 2).sum(1).min())

    return min(rung.colours, key=distance)


@functools.cache
def _rows() -> dict[str, np.ndarray]:
    """Rows of each shape in the bank."""
    names = np.array([kind[0] for kind in _bank()[0]])
    return {shape: np.flatnonzero(names == shape) for shape in SHAPES}


def _crops(
    field: np.ndarray, centre: tuple[float, float]
) -> tuple[list[tuple[float, float]], np.ndarray]:
    """Unit crops `[784, 25]` of a field around a centre moved by up to 2 pixels."""
    padded = np.pad(field, _CROP)
    half = _CROP // 2
    shifts, crops = [], []
    for dy, dx in itertools.product(range(-2, 3), repeat=2):
        row, column = round(centre[0]) + dy, round(centre[1]) + dx
        top, left = row - half + _CROP, column - half + _CROP
        shifts.append((float(row), float(column)))
        crops.append(padded[top : top + _CROP, left : left + _CROP].ravel())
    stacked = np.stack(crops, axis=1).astype(np.float32)
    return shifts, stacked / (np.linalg.norm(stacked, axis=0) + 1e-9)


def satisfies(found: Parse, spec: Spec) -> bool:
    """All checks at once: well formed, the right number of objects, every named attribute, the
    relation, style and ground.
    """  # noqa: D205
    if found.malformed or (spec.style or found.style) != found.style:
        return False
    if (spec.ground or found.ground) != found.ground:
        return False
    return answered(found.objects, spec)
