"""How many steps a recipe's stages have, so that all runs use the same number of evaluations.

A stage of s steps, each of n examples that cost c UNet forwards apiece, uses

    E = s n c                                                                    (1)

forwards: the teacher's (two a guided call), the target's, the rollout's, the student's and the
critics', as `distillation.stages.evaluations` counts them and `unet_evaluations_per_second` shows
them. The student's backward passes, one an example, are not in E and are told beside it. For a
total E and shares a_i,

    s_i = round(a_i E / (n_i c_i)),   at least 1,                                (2)

but for the stage whose step is the cheapest, which takes what the others have left over. So a
total is met to within half of that stage's step, wherever a step of each stage fits into E.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tlcm_jax.config.schema import Settings, StageSettings, read
from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.networks import Networks, Role, Scorer

# UNet forwards of a budget of 1: the default recipe's, `configs/emoji.py`, to half a percent.
# Fixed, so that a mended default does not make all other runs anew.
WHOLE = 84_480.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage costs.

    Attributes:
      examples: of a step, n of (1).
      forwards: an example, c of (1).
      backwards: of the student, an example.
    """

    examples: int
    forwards: float
    backwards: float

    @property
    def step(self) -> float:
        """UNet forwards of a step."""
        return self.examples * self.forwards


def costs(settings: Settings) -> dict[str, Cost]:
    """What each stage of a recipe costs, by name.

    Nothing is loaded: terms are built for networks that are never called.
    """
    return {name: _cost(stage) for name, stage in settings.stages.items()}


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

    Warm-ups keep their number of updates, up to a tenth of the stage's.

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
        updates = steps[name] * stage.get("updates", 1)
        warmup = min(stage.get("warmup_updates", 0), updates // 10)
        result["stages"][name] = {**stage, "steps": steps[name], "warmup_updates": warmup}
    return result


def _cost(stage: StageSettings) -> Cost:
    kind = stages.find(stage.objective)
    terms = stages.build_terms(_STAND_INS, _SCHEDULE, stage.terms)
    found = stages.evaluations(stage.objective, stage.settings, terms, stage.epochs)
    return Cost(
        examples=stage.batch_size * kind.examples_per_prompt(stage.settings),
        forwards=found.total,
        backwards=found.student,
    )


def _never(*_: Any) -> Callable:
    raise AssertionError("a network that only stands in for one was called")


_ROLE = Role(initial=_never, network=_never)
_SCORER = Scorer(score=_never, threshold=0.0)
_STAND_INS = Networks(
    student=_never,
    teacher=_never,
    null=_never,
    fake=_ROLE,
    discriminator=lambda layers: _ROLE,
    decode=_never,
    reward=_SCORER,
    judge=_SCORER,
    perceptual=_never,
)
# Costs do not depend on it.
_SCHEDULE = NoiseSchedule(np.linspace(0.99, 0.01, 1000, dtype=np.float32), "epsilon")
