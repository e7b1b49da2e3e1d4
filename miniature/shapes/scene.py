"""What a picture of the shapes world holds, and how one is drawn from an integer.

A `Spec` is what a caption says: groups of objects, each attribute named or left open, and perhaps
a relation, a style and a ground. A `Scene` is one answer to it: every attribute and every free
quantity (place, rotation, exact hue, background) decided. Both are pure functions of an integer:

    spec ~ p(spec | rung)                                                       (1)
    scene ~ p(scene | spec, rung)                                               (2)

In (2) an attribute that the spec leaves open is uniform over the rung's values, for each object
independently of everything else, so the answers to a caption have a known distribution.
Training uses integers below `TEST_START`, tests those from it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

SIDE = 64  # pixels
TEST_START = 2**31

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
CONTRASTS = ("bold", "faint")
FILLS = ("plain", "striped")
RELATIONS = ("left of", "right of", "above", "below")
STYLES = ("flat", "outlined", "soft", "pixel art")
GROUNDS = ("tinted", "white", "dark", "grid")

DIAMETERS = {"small": (12.0, 14.0), "large": (17.0, 20.0)}  # pixels across
MAX_OBJECTS = 4
ATTRIBUTES = {
    "size": SIZES,
    "contrast": CONTRASTS,
    "fill": FILLS,
    "colour": COLOURS,
    "shape": SHAPES,
}
_SPEC_STREAM, _SCENE_STREAM = 1, 2
_GAP = 2.0  # pixels between objects
_TRIES = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One noun phrase of a caption; an attribute that is None is not named.

    Attributes:
      number: 1 to 4 objects; None is an open plural ("stars"): 2 to 4, uniform.
    """

    number: int | None = 1
    size: str | None = None
    contrast: str | None = None
    fill: str | None = None
    colour: str | None = None
    shape: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a caption says.

    Attributes:
      groups: one to three noun phrases.
      relation: where the first group lies, seen from the second; both are single objects then.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    style: str | None = None
    ground: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: named attributes, and the free quantities that no caption mentions.

    Attributes:
      x: centre, in pixels from the left edge.
      y: centre, in pixels from the upper edge.
      radius: half the size across, pixels.
      rotation: radians, clockwise.
      tone: brightness factor and shift of each channel, the exact hue.
      phase: of the stripes, 0..1.
    """

    size: str
    contrast: str
    fill: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rotation: float
    tone: tuple[float, float, float, float]
    phase: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's whole content.

    Attributes:
      things: the objects, in the order of the spec's groups.
      counts: how many of them belong to each group.
      light: background level, slope and direction (radians) of its gradient.
      tint: shift of each channel.
      texture: phases and wave vectors of the background's two slow waves.
      grid_phase: of the grid's lines, pixels.
    """

    things: tuple[Thing, ...]
    counts: tuple[int, ...]
    style: str
    ground: str
    light: tuple[float, float, float]
    tint: tuple[float, float, float]
    texture: tuple[tuple[float, float, float], ...]
    grid_phase: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """How much of the world is in use: the values of each attribute and the kinds of caption.

    Attributes:
      layouts: weight of each kind: "single", "many" (one counted group), "pair" ("and"),
        "relation", "three" (three groups).
      named: probability that a caption names an attribute.
    """

    name: str
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = COLOURS
    sizes: tuple[str, ...] = SIZES
    contrasts: tuple[str, ...] = ("bold",)
    fills: tuple[str, ...] = ("plain",)
    styles: tuple[str, ...] = ("flat",)
    grounds: tuple[str, ...] = ("tinted",)
    layouts: tuple[tuple[str, float], ...] = (("single", 1.0),)
    named: tuple[tuple[str, float], ...] = (
        ("size", 0.4),
        ("contrast", 0.3),
        ("fill", 0.4),
        ("colour", 0.85),
        ("shape", 0.85),
        ("number", 0.9),
        ("style", 0.5),
        ("ground", 0.5),
    )

    def values(self, attribute: str) -> tuple[str, ...]:
        """The values of one of `ATTRIBUTES`."""
        return getattr(self, attribute + "s")


_PAIRS = (("single", 0.4), ("pair", 0.3), ("relation", 0.3))
_EVERY = (("single", 0.25), ("many", 0.25), ("pair", 0.2), ("relation", 0.25), ("three", 0.05))
RUNGS = {
    rung.name: rung
    for rung in (
        Rung(name="r1"),
        Rung(name="r2", layouts=_PAIRS),
        Rung(name="r3", layouts=_EVERY),
        Rung(
            name="full",
            contrasts=CONTRASTS,
            fills=FILLS,
            styles=STYLES,
            grounds=GROUNDS,
            layouts=_EVERY,
        ),
    )
}


def draw_spec(index: int, rung: Rung) -> Spec:
    """Equation (1): the caption's content of one integer; held-out content is drawn again."""
    from miniature.shapes.splits import held_out  # splits names this module's types

    rng = np.random.default_rng([index, _SPEC_STREAM])
    while True:
        spec = _propose(rng, rung)
        if not held_out(spec):
            return spec


def _propose(rng: np.random.Generator, rung: Rung) -> Spec:
    layouts, weights = zip(*rung.layouts, strict=True)
    layout = layouts[rng.choice(len(layouts), p=np.divide(weights, sum(weights)))]
    chance = dict(rung.named)

    def pick(values: Sequence[str], probability: float) -> str | None:
        named = len(values) > 1 and rng.random() < probability
        return values[rng.integers(len(values))] if named else None

    def group(number: int | None) -> Group:
        named = {a: pick(rung.values(a), chance[a]) for a in ATTRIBUTES}
        return Group(number=number, **named)

    relation = None
    if layout == "many":
        named = rng.random() < chance["number"]
        groups = (group(int(rng.integers(2, MAX_OBJECTS + 1)) if named else None),)
    elif layout == "pair":
        first = int(rng.integers(1, 4))
        groups = (group(first), group(int(rng.integers(1, MAX_OBJECTS - first + 1))))
        if "many" not in layouts:
            groups = tuple(dataclasses.replace(g, number=1) for g in groups)
    elif layout == "relation":
        groups = (group(1), group(1))
        relation = RELATIONS[rng.integers(len(RELATIONS))]
    elif layout == "three":
        groups = (group(1), group(1), group(1))
    else:
        groups = (group(1),)
    style, ground = pick(rung.styles, chance["style"]), pick(rung.grounds, chance["ground"])
    return Spec(groups=groups, relation=relation, style=style, ground=ground)


def draw_scene(spec: Spec, index: int, rung: Rung) -> Scene:
    """Equation (2): the answer to a spec that one integer chooses.

    Open attributes never form a held-out pair of shape and colour, unless the spec names it.
    """
    from miniature.shapes.splits import HELD_PAIRS

    rng = np.random.default_rng([index, _SCENE_STREAM])
    kinds, counts = [], []
    for group in spec.groups:
        number = group.number or int(rng.integers(2, MAX_OBJECTS + 1))
        counts.append(number)
        for _ in range(number):
            while True:
                kind = {
                    a: getattr(group, a) or rung.values(a)[rng.integers(len(rung.values(a)))]
                    for a in ATTRIBUTES
                }
                named = group.shape and group.colour
                if named or (kind["shape"], kind["colour"]) not in HELD_PAIRS:
                    break
            kinds.append(kind)
    radii = [rng.uniform(*DIAMETERS[kind["size"]]) / 2 for kind in kinds]
    places = _places(rng, radii, spec.relation)
    things = []
    for kind, radius, (x, y) in zip(kinds, radii, places, strict=True):
        swing = 0.5 if kind["shape"] == "moon" else 0.35
        tone = (1 + 0.12 * rng.uniform(-1, 1), *rng.uniform(-0.03, 0.03, 3).tolist())
        things.append(
            Thing(
                **kind,
                x=float(x),
                y=float(y),
                radius=radius,
                rotation=rng.uniform(-swing, swing),
                tone=tone,
                phase=rng.random(),
            )
        )
    waves = [(rng.uniform(-2, 2), rng.uniform(-2, 2), rng.uniform(0, 2 * np.pi)) for _ in "ab"]
    return Scene(
        things=tuple(things),
        counts=tuple(counts),
        style=spec.style or rung.styles[rng.integers(len(rung.styles))],
        ground=spec.ground or rung.grounds[rng.integers(len(rung.grounds))],
        light=(rng.uniform(-1, 1), rng.uniform(0, 1), rng.uniform(0, 2 * np.pi)),
        tint=tuple(rng.uniform(-1, 1, 3).tolist()),
        texture=tuple(waves),
        grid_phase=tuple(rng.uniform(0, 8, 2).tolist()),
    )


def related(relation: str, first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether `first` (x, y) lies as the relation says, seen from `second`.

    The axis is the one along which they are further apart.
    """
    dx, dy = first[0] - second[0], first[1] - second[1]
    across = abs(dx) > abs(dy)
    return {
        "left of": across and dx < 0,
        "right of": across and dx > 0,
        "above": not across and dy < 0,
        "below": not across and dy > 0,
    }[relation]


def answered(objects: Sequence[Any], spec: Spec) -> bool:
    """Whether objects (`Thing`, or as read) can be shared out among the groups so that all is as
    said; style and ground aside.
    """  # noqa: D205
    open_count = any(group.number is None for group in spec.groups)
    wanted = [g for group in spec.groups for g in [group] * (group.number or len(objects))]
    if len(wanted) != len(objects) or (open_count and not 2 <= len(objects) <= MAX_OBJECTS):
        return False
    for order in itertools.permutations(objects):
        pairs = list(zip(order, wanted, strict=True))
        if all(
            (getattr(group, a) or getattr(thing, a)) == getattr(thing, a)
            for thing, group in pairs
            for a in ATTRIBUTES
        ):
            places = [(thing.x, thing.y) for thing in order[:2]]
            if spec.relation is None or related(spec.relation, *places):
                return True
    return False


def _places(
    rng: np.random.Generator, radii: Sequence[float], relation: str | None
) -> list[tuple[float, float]]:
    """Uniform places inside the picture, rejected together until no two overlap."""
    while True:
        places: list[tuple[float, float]] = []
        for _ in range(_TRIES):
            radius = radii[len(places)]
            x, y = rng.uniform(radius + 1, SIDE - radius - 1, 2)
            near = (
                np.hypot(x - a, y - b) < 1.15 * (radius + other) + _GAP
                for (a, b), other in zip(places, radii, strict=False)
            )
            if any(near):
                continue
            places.append((x, y))
            if len(places) == len(radii):
                if relation is None or related(relation, places[0], places[1]):
                    return places
                break
