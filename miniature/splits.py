"""Which (object, style) pairs the teacher never sees, and which only the distillation never sees.

Both choices rank objects by a hash of their code points, so they hold on any machine and do not
depend on the order of reading.

* composition: 5 % of all pairs (351), one each of objects that have at least three styles. The
  teacher is not trained on that picture; its object and its style both remain in training.
* heldout: 400 pairs that the teacher is trained on and whose captions distillation never sees.
  One per object, equally many per style, of objects whose four styles are all in training.
"""

import hashlib
from collections.abc import Mapping, Sequence

Pair = tuple[str, str]  # hex code, style

COMPOSITION_SHARE = 0.05  # of all pairs
HELDOUT_SHARE = 0.057
_MIN_STYLES = 3


def rank(purpose: str, hexcode: str) -> int:
    """A number that orders objects for one purpose, equal on every machine."""
    digest = hashlib.sha256(f"{purpose}/{hexcode}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def composition_pairs(styles_of: Mapping[str, Sequence[str]]) -> set[Pair]:
    """Pairs held out of the teacher's training.

    Args:
      styles_of: hex code -> the styles in which the object exists.

    Returns:
      About `COMPOSITION_SHARE` of all pairs; at most one per object, and none of an object with
      fewer than three styles.
    """
    count = round(COMPOSITION_SHARE * sum(len(styles) for styles in styles_of.values()))
    able = sorted(
        (h for h, styles in styles_of.items() if len(styles) >= _MIN_STYLES),
        key=lambda h: rank("composition", h),
    )
    return {
        (h, sorted(styles_of[h])[rank("composition style", h) % len(styles_of[h])])
        for h in able[:count]
    }


def heldout_pairs(styles_of: Mapping[str, Sequence[str]], all_styles: Sequence[str]) -> set[Pair]:
    """Pairs held out of the distillation's prompts only.

    Args:
      styles_of: hex code -> the styles in which the object exists.
      all_styles: every style.

    Returns:
      About `HELDOUT_SHARE` of all pairs, equally many per style, one per object; only objects
      that have every style, none of which is in `composition_pairs`.
    """
    reduced = {hexcode for hexcode, _ in composition_pairs(styles_of)}
    total = sum(len(styles) for styles in styles_of.values())
    able = sorted(
        (h for h, s in styles_of.items() if set(s) == set(all_styles) and h not in reduced),
        key=lambda h: rank("heldout", h),
    )
    count = min(round(HELDOUT_SHARE * total), len(able))
    count -= count % len(all_styles)
    return {(h, all_styles[i % len(all_styles)]) for i, h in enumerate(able[:count])}
