"""What the terms that follow scorers share: which they follow, and the one that they do not.

A scorer can be pleased in ways that people are not (reward hacking). So beside the scorers that a
term follows, a recipe can name one that nothing follows, the held-out reward, which is reported and
can end the stage.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tlcm_jax.distillation.checks import check_at_least

# Rows of metrics that are averaged at a stage's start and at its end.
_ROWS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """A scorer that is followed.

    Attributes:
      scorer: a name in `evaluation.scorers.table.SCORERS`, or a plug-in's dotted one; empty takes
        the key under which the recipe has it.
      weights: the folder or file of its weights, or what else its loader takes.
      weight: beside the term's other scorers; one of weight 0 is left out.
    """

    scorer: str = ""
    weights: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("weight", self.weight, 0)


Chosen = TypeVar("Chosen", bound=ScorerSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredSettings:
    """What a term that follows scorers says of itself and of its held-out reward.

    Attributes:
      weight: of the term, beside the consistency loss.
      held_out: a scorer that is not followed; empty reports none.
      held_out_weights: its folder or file.
      stop_on_reward_hacking: end the stage when the held-out reward has fallen by more than
        `tolerance`, in its own units, while a scorer that is followed rose.
      tolerance: see there.
    """

    weight: float = 1.0
    held_out: str = ""
    held_out_weights: str = ""
    stop_on_reward_hacking: bool = False
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("weight", self.weight, 0)
        check_at_least("tolerance", self.tolerance, 0)
        if self.stop_on_reward_hacking and not self.held_out:
            raise ValueError("stop_on_reward_hacking needs a held_out scorer: name one")


def followed(scorers: Mapping[str, Chosen], settings: ScoredSettings) -> dict[str, Chosen]:
    """The scorers that have a weight, each with its name.

    Args:
      scorers: by the recipe's keys.
      settings: the term's.

    Raises:
      ValueError: none has, one is followed twice, or is its own check.
    """
    found: dict[str, Chosen] = {}
    for key, chosen in scorers.items():
        named = dataclasses.replace(chosen, scorer=chosen.scorer or key)
        for other, before in found.items():
            if dataclasses.replace(named, weight=before.weight) == before:
                raise ValueError(f"scorers: {key!r} is {other!r} again; name each once")
        if (settings.held_out, settings.held_out_weights) == (named.scorer, named.weights):
            raise ValueError(f"held_out: scorer {key!r} cannot be its own check; name another")
        if named.weight > 0:
            found[key] = named
    if not found:
        raise ValueError("scorers: none has a weight above 0; name at least one")
    return found


def reward_hacking(
    rows: Sequence[Mapping[str, Any]], prefix: str, keys: Collection[str], tolerance: float
) -> str:
    """Why the stage should end: the held-out reward has fallen while a followed one rose; or "".

    Args:
      rows: of the stage's metrics so far, with `PREFIX/KEY/score` and `PREFIX/held_out`.
      prefix: before the term's metrics.
      keys: of the scorers that are followed.
      tolerance: how far the held-out reward may fall.
    """
    if len(rows) < 2 * _ROWS:
        return ""

    def rise(name: str) -> float:
        column = [row[f"{prefix}/{name}"] for row in rows]
        return float(np.mean(column[-_ROWS:]) - np.mean(column[:_ROWS]))

    rises = {key: rise(f"{key}/score") for key in keys}
    best, held_out = max(rises, key=lambda key: rises[key]), rise("held_out")
    if rises[best] > 0 and held_out < -tolerance:
        return (
            f"the held-out reward fell by {-held_out:.3g} while {best!r} rose by "
            f"{rises[best]:.3g} (tolerance {tolerance:g})"
        )
    return ""
