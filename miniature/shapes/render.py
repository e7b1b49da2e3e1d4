"""Draws a `Scene` as pixels; numpy alone, a few milliseconds a picture.

An object is a mask (share of each pixel that it covers, by supersampling its own box) that blends
its colour over the background:

    image = (1 - a m) background + a m colour,   a = opacity of its contrast    (1)
"""

import numpy as np
from jaxtyping import Float, UInt8

from miniature.shapes.scene import SIDE, Rung, Scene, Thing, draw_scene, draw_spec

PALETTE = {
    "red": (0.86, 0.14, 0.15),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.96, 0.86, 0.12),
    "green": (0.13, 0.62, 0.24),
    "cyan": (0.15, 0.78, 0.86),
    "blue": (0.14, 0.28, 0.85),
    "purple": (0.52, 0.18, 0.72),
    "pink": (0.97, 0.48, 0.70),
}
OPACITY = {"bold": 1.0, "faint": 0.5}
STRIPE_PERIOD = 0.62  # of the radius
_SUPERSAMPLING = 4
_CENTRES = (np.arange(SIDE) + 0.5) / SIDE - 0.5
_X, _Y = np.meshgrid(_CENTRES, _CENTRES)


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie inside a shape of radius 1 around the origin, y downwards."""
    if shape == "circle":
        return x**2 + y**2 < 0.9**2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) < 0.78
    if shape == "triangle":
        return (y < 0.62) & (np.abs(x) < (y + 1.0) * 0.62)
    if shape == "star":
        # Between a tip (radius 1) and a notch (0.42), 36 degrees apart, runs a straight edge.
        angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        radius, notch = np.hypot(x, y), 0.42
        turn = np.pi / 5
        edge = (
            notch * np.sin(turn) / (notch * np.sin(turn - angle) + np.sin(angle) + 1e-12)
        )  # polar form of the line through both
        return radius < edge
    if shape == "heart":
        u, v = 1.22 * x, -1.22 * y + 0.12
        return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 < 0
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return ((a < 0.3) & (b < 0.95)) | ((b < 0.3) & (a < 0.95))
    if shape == "ring":
        radius = x**2 + y**2
        return (radius < 0.95**2) & (radius > 0.52**2)
    if shape == "moon":
        return (x**2 + y**2 < 0.95**2) & ((x - 0.48) ** 2 + (0.9 * y) ** 2 > 0.7**2)
    raise ValueError(f"shape {shape!r}: not one that can be drawn")


def mask(
    shape: str, x: float, y: float, radius: float, rotation: float, scale: float = 1.0
) -> tuple[tuple[slice, slice], Float[np.ndarray, "h w"]]:
    """The object's box in the picture, and the share of each of its pixels that is covered.

    Args:
      shape: one of `SHAPES`.
      x: centre, pixels.
      y: centre, pixels.
      radius: pixels.
      rotation: radians.
      scale: draws the shape smaller inside the same box (for an outline's inner edge).
    """
    reach = 1.15 * radius + 1
    x0, x1 = max(0, int(x - reach)), min(SIDE, int(x + reach) + 1)
    y0, y1 = max(0, int(y - reach)), min(SIDE, int(y + reach) + 1)
    fine, width, height = _SUPERSAMPLING, x1 - x0, y1 - y0
    u = (x0 + (np.arange(width * fine) + 0.5) / fine - x) / radius / scale
    v = (y0 + (np.arange(height * fine) + 0.5) / fine - y) / radius / scale
    c, s = np.cos(rotation), np.sin(rotation)
    covered = inside(shape, u[None] * c + v[:, None] * s, v[:, None] * c - u[None] * s)
    share = covered.reshape(height, fine, width, fine).mean((1, 3))
    return (slice(y0, y1), slice(x0, x1)), share


def background(scene: Scene) -> Float[np.ndarray, "64 64 3"]:
    """The picture without its objects: level, gradient, tint, two slow waves, and the grid."""
    level, slope, direction = scene.light
    ramp = _X * np.cos(direction) + _Y * np.sin(direction)
    waves = sum(np.sin(2 * np.pi * (a * _X + b * _Y) + phase) for a, b, phase in scene.texture)
    centre, spread, tint = {
        "white": (0.975, 0.01, 0.005),
        "dark": (0.16, 0.03, 0.03),
        "grid": (0.90, 0.02, 0.02),
        "tinted": (0.84, 0.05, 0.04),
    }[scene.ground]
    plane = centre + spread * level + spread * slope * 1.5 * ramp + 0.006 * waves
    image = plane[..., None] + tint * np.asarray(scene.tint)
    if scene.ground == "grid":
        pixel = np.arange(SIDE)
        for axis, phase in enumerate(scene.grid_phase):
            near = np.abs((pixel - phase + 4) % 8 - 4)
            line = 0.14 * np.clip(1 - near, 0, 1)
            image = image - (line[:, None, None] if axis else line[None, :, None])
    return np.clip(image, 0, 1)


def colour_of(thing: Thing) -> Float[np.ndarray, "3"]:
    """The object's exact colour."""
    factor, *shift = thing.tone
    return np.clip(np.asarray(PALETTE[thing.colour]) * factor + shift, 0, 1)


def _paint(thing: Thing, style: str, box: tuple[slice, slice], share: np.ndarray) -> np.ndarray:
    """Colour of each pixel of an object's box, `[h, w, 3]`."""
    colour = colour_of(thing)
    ys, xs = np.mgrid[box]
    u, v = (xs + 0.5 - thing.x) / thing.radius, (ys + 0.5 - thing.y) / thing.radius
    paint = np.broadcast_to(colour, (*share.shape, 3))
    if thing.fill == "striped":
        c, s = np.cos(thing.rotation + 0.785), np.sin(thing.rotation + 0.785)
        wave = np.sin(2 * np.pi * ((u * c + v * s) / STRIPE_PERIOD + thing.phase))
        bright = np.clip(0.5 + 1.2 * wave, 0, 1)[..., None]
        paint = paint * (1 - bright) + (0.25 * paint + 0.75) * bright
    if style == "soft":
        light = np.clip(1.08 - 0.32 * (u + v + 0.2), 0.62, 1.35)[..., None]
        paint = np.clip(paint * light, 0, 1)
    if style == "outlined":
        inner = mask(thing.shape, thing.x, thing.y, thing.radius, thing.rotation, 0.76)[1]
        edge = np.clip(share - inner, 0, 1)[..., None]
        paint = paint * (1 - edge) + 0.3 * colour * edge
    return paint


def draw(image: Float[np.ndarray, "64 64 3"], thing: Thing, style: str) -> None:
    """Draws one object into a picture of floats, equation (1)."""
    box, share = mask(thing.shape, thing.x, thing.y, thing.radius, thing.rotation)
    paint = _paint(thing, style, box, share)
    alpha = OPACITY[thing.contrast] * share[..., None]
    if style == "pixel art":
        whole = np.zeros((SIDE, SIDE, 4))
        whole[box] = np.concatenate([paint * share[..., None], share[..., None]], -1)
        coarse = whole.reshape(SIDE // 2, 2, SIDE // 2, 2, 4).mean((1, 3))
        colour = coarse[..., :3] / np.maximum(coarse[..., 3:], 1e-6)
        blocks = np.concatenate([colour, coarse[..., 3:] > 0.5], -1).repeat(2, 0).repeat(2, 1)
        paint, alpha = blocks[..., :3], OPACITY[thing.contrast] * blocks[..., 3:]
        box = (slice(None), slice(None))
    image[box] = image[box] * (1 - alpha) + alpha * paint


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """The whole picture."""
    image = background(scene)
    for thing in scene.things:
        draw(image, thing, scene.style)
    return np.round(255 * image).astype(np.uint8)


def picture(index: int, rung: Rung) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture of one integer."""
    return render(draw_scene(draw_spec(index, rung), index, rung))
