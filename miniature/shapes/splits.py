"""What is held out: compositions that the teacher never sees.

* `HELD_PAIRS`: a diagonal of the shapes x colours grid (8 of 64 pairs). No training picture holds
  such an object and no training caption names it; its shape and its colour both remain.
* `HELD_RELATIONS`: (shape, relation, shape) triples, 5 % of them by hash; no training caption
  names one, in either direction of saying it.
"""

import hashlib

from miniature.shapes.scene import COLOURS, RELATIONS, SHAPES, Spec

HELD_PAIRS = frozenset(zip(SHAPES, COLOURS, strict=True))
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
_HELD_SHARE = 0.05


def _held_triple(first: str, relation: str, second: str) -> bool:
    # "a above b" and "b below a" are one arrangement.
    said = min((first, relation, second), (second, _OPPOSITE[relation], first))
    digest = hashlib.sha256("/".join(said).encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_SHARE * 2**64


HELD_RELATIONS = frozenset(
    (a, r, b) for a in SHAPES for r in RELATIONS for b in SHAPES if _held_triple(a, r, b)
)


def held_out(spec: Spec) -> bool:
    """Whether a spec names something that training never sees."""
    if any((group.shape, group.colour) in HELD_PAIRS for group in spec.groups):
        return True
    if spec.relation is None:
        return False
    first, second = spec.groups[:2]
    return (first.shape, spec.relation, second.shape) in HELD_RELATIONS
