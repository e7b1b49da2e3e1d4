"""How many steps a recipe's stages have, so that all runs use the same number of evaluations.

A stage of s steps, each of n pairs that cost c UNet forwards apiece, uses

    E = s n c                                                                    (1)

forwards: the teacher's (two a guided call), the target's, the rollout's, the student's and the
auxiliary networks', as `StageLoss.nfe_per_pair` counts them and `nfe_per_second` shows them; what
made a pair is shared out over its visits. The student's backward passes, one a pair, are not in E
and stand beside it. For a total E and shares a_i,

    s_i = round(a_i E / (n_i c_i)),   at least 1,                                (2)

but for the stage whose step is the cheapest, which takes what the others have left over. So a
total is met to within half of that stage's step, wherever a step of each stage fits into E.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from tlcm_jax.config.build import nfe_per_pair
from tlcm_jax.config.schema import Settings, read
from tlcm_jax.distillation.networks import model_networks
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.families.load import abstract_model

# UNet forwards of a budget of 1: the default recipe's, `configs/shapes.py`, to half a percent.
# Fixed, so that a mended default does not make all other runs anew.
WHOLE = 163_200.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage costs.

    Attributes:
      pairs: of a step, n of (1).
      forwards: a pair, c of (1).
      backwards: of the student, a pair.
    """

    pairs: int
    forwards: float
    backwards: float

    @property
    def step(self) -> float:
        """UNet forwards of a step."""
        return self.pairs * self.forwards


def costs(settings: Settings) -> dict[str, Cost]:
    """What each stage of a recipe costs, by name.

    No weights are read: networks are shapes, and terms that have weights of their own cost no UNet
    forwards.
    """
    model = _shapes(settings.model.path)
    resolution = settings.model.size
    networks = model_networks(model, settings.adapter, resolution, settings.trainable == "full")
    found = {}
    for name, stage in settings.stages.items():
        terms = {
            term: chosen.load(model, networks, settings.adapter)
            for term, chosen in stage.terms.items()
            if not hasattr(chosen, "weights") and not hasattr(chosen, "scorers")
        }
        loss = StageLoss(stage.settings.build(networks), terms)
        forwards = nfe_per_pair(loss, stage.epochs)
        found[name] = Cost(pairs=stage.batch_size, forwards=forwards, backwards=1.0)
    return found


_shapes = functools.lru_cache(abstract_model)


def total(settings: Settings) -> float:
    """UNet forwards of a whole recipe, (1) over its stages."""
    found = costs(settings)
    return sum(stage.steps * found[name].step for name, stage in settings.stages.items())


def shares(settings: Settings) -> dict[str, float]:
    """How a recipe's stages share its evaluations; they add up to 1."""
    found, whole = costs(settings), total(settings)
    return {name: s.steps * found[name].step / whole for name, s in settings.stages.items()}


def scaled(
    config: Mapping[str, Any], evaluations: float, parts: Mapping[str, float]
) -> dict[str, Any]:
    """A recipe whose stages have as many steps as so many evaluations allow, by (2).

    Warm-ups keep their number of steps, up to a tenth of the stage's.

    Args:
      config: the recipe as plain values; not changed.
      evaluations: E.
      parts: each stage's share, in any unit.

    Raises:
      ValueError: shares of other stages, or none above 0.
    """
    found = costs(read(config))
    if set(parts) != set(found) or not all(part > 0 for part in parts.values()):
        raise ValueError(f"shares {dict(parts)}: give a positive one to each of {list(found)}")
    whole = sum(parts.values())
    *others, last = sorted(found, key=lambda name: -found[name].step)
    steps, left = {}, evaluations
    for name in others:
        steps[name] = max(1, round(evaluations * parts[name] / whole / found[name].step))
        left -= steps[name] * found[name].step
    steps[last] = max(1, round(left / found[last].step))
    result = {**config, "stages": {}}
    for name, stage in config["stages"].items():
        warmup = min(stage.get("warmup_steps", 0), steps[name] // 10)
        result["stages"][name] = {**stage, "steps": steps[name], "warmup_steps": warmup}
    return result
