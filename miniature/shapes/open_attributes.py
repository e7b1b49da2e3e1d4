"""Whether what a caption leaves open stays open: `scorers=("miniature.shapes.open_attributes",)`.

What a caption does not name has a known distribution in this world, p_a, and so have the places.
Of the images i that answer a caption of one object with one object, each attribute a that is open
there gives the observed value x_i, and

    TV_a = 1/2 sum_v | mean_i ([x_i = v] - p_a(v | caption_i)) |                              (1)

is the total-variation distance of what is drawn from that distribution: 0 where every mode is
covered as often as it should be, 1 - 1/n where of n equal ones a single one is drawn. Few images
err upwards: read it beside the row of real renders, which are as many.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from miniature.shapes.parser import Found
from miniature.shapes.scene import DIAMETERS, SIDE, Group, Rung, Spec
from miniature.shapes.scorer import ShapesScorer, parsed, rung_named, spec_of_caption
from miniature.shapes.splits import HELD_PAIRS
from tlcm_jax.evaluation.scorers.base import Annotations, Measure

ATTRIBUTES = ("size", "colour", "shape", "contrast", "fill")
CELLS = 4  # along each side, of the coverage of places


def distances(
    images: UInt8[np.ndarray, "n 64 64 3"], specs: Sequence[Spec], rung: Rung
) -> dict[str, float]:
    """Equation (1) by attribute, and of "place"; those that no caption leaves open are absent."""
    return _summarise(_differences(images, specs, rung))


def _differences(
    images: UInt8[np.ndarray, "n 64 64 3"], specs: Sequence[Spec], rung: Rung
) -> dict[str, Float[np.ndarray, "n v"]]:
    """The summands of (1) by attribute; NaN where an image does not count."""
    widths = {a: len(rung.values(a)) for a in ATTRIBUTES} | {"place": CELLS**2}
    rows = {a: np.full((len(images), n), np.nan) for a, n in widths.items() if n > 1}
    for i, (image, spec) in enumerate(zip(images, specs, strict=True)):
        objects = parsed(image, rung).objects
        if len(spec.groups) != 1 or spec.groups[0].number != 1 or len(objects) != 1:
            continue
        for attribute, row in rows.items():
            if attribute == "place":
                seen, prior = _cell(objects[0]), _place_prior(spec.groups[0].size, rung)
            elif getattr(spec.groups[0], attribute):
                continue
            else:
                seen = rung.values(attribute).index(getattr(objects[0], attribute))
                prior = _prior(spec.groups[0], attribute, rung)
            row[i] = -prior
            row[i, seen] += 1
    return rows


def _summarise(rows: Mapping[str, Float[np.ndarray, "n v"]]) -> dict[str, float]:
    found = {}
    for attribute, row in rows.items():
        counted = row[~np.isnan(row[:, 0])]
        if len(counted):
            found[attribute] = 0.5 * float(np.abs(counted.mean(0)).sum())
    return found


def _cell(thing: Found) -> int:
    row, column = np.clip([thing.y, thing.x], 0, SIDE - 1).astype(int) * CELLS // SIDE
    return int(row * CELLS + column)


def _prior(group: Group, attribute: str, rung: Rung) -> Float[np.ndarray, " v"]:
    """Probability of each value of an open attribute, given what the group names."""
    values = rung.values(attribute)
    weights = np.ones(len(values))
    if attribute in ("colour", "shape"):
        other = "shape" if attribute == "colour" else "colour"
        others = (getattr(group, other),) if getattr(group, other) else rung.values(other)
        for i, value in enumerate(values):
            pair = ((o, value) if attribute == "colour" else (value, o) for o in others)
            weights[i] = sum(p not in HELD_PAIRS for p in pair)
    return weights / weights.sum()


@functools.lru_cache
def _place_prior(size: str | None, rung: Rung) -> Float[np.ndarray, " v"]:
    """Probability of each cell of places: uniform within the size's margin."""
    total = np.zeros(CELLS**2)
    for each in (size,) if size else rung.sizes:
        for diameter in np.linspace(*DIAMETERS[each], 5):
            margin = diameter / 2 + 1
            edges = np.clip(np.linspace(0, SIDE, CELLS + 1), margin, SIDE - margin)
            line = np.diff(edges) / (SIDE - 2 * margin)
            total += np.outer(line, line).ravel()
    return total / total.sum()


class OpenAttributesScorer(ShapesScorer):
    """Equation (1), its mean over the open attributes, and that of the places."""

    name = "open attributes"
    measures = (
        Measure(key="open_attributes", title="open attributes, TV", higher_is_better=False),
        Measure(key="places", title="places, TV", higher_is_better=False),
    )

    def values(
        self, images: np.ndarray, prompts: Sequence[str], annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """See `Scorer`: the summands of (1)."""
        del annotations
        return _differences(images, [spec_of_caption(prompt) for prompt in prompts], self.rung)

    def summarise(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `Scorer`; NaN where nothing counts."""
        found = _summarise(values)
        places = found.pop("place", np.nan)
        attributes = float(np.mean(list(found.values()))) if found else np.nan
        return {"open_attributes": attributes, "places": places}


def load(path: str = "") -> OpenAttributesScorer:
    """For a rung, as `miniature.shapes.open_attributes=r2`; without one, for the first.

    Raises:
      ValueError: there is no such rung.
    """
    return OpenAttributesScorer(rung_named(path, "miniature.shapes.open_attributes"))
