"""The table of stages: a recipe names an objective, this file knows where it lives.

A new objective is one file beside this one, and one line in `STAGES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tlcm_jax.diffusion.schedule import NoiseSchedule
from tlcm_jax.distillation import consistency, endpoints, trajectories
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import Evaluations, Objective


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of objective.

    Attributes:
      settings: its frozen dataclass of choices, whose defaults are the paper's.
      objective: `(networks, schedule, latent_shape, settings) -> Objective`.
      evaluations_per_sample: `(settings) -> Evaluations`, the forwards that one example costs.
      examples_per_prompt: `(settings) -> int`, how many examples a prompt of a batch makes.
    """

    settings: type
    objective: Callable[..., Objective]
    evaluations_per_sample: Callable[[Any], Evaluations]
    examples_per_prompt: Callable[[Any], int]


STAGES = {
    "segment_consistency": Stage(
        settings=consistency.SegmentConsistencySettings,
        objective=consistency.segment_consistency,
        evaluations_per_sample=consistency.evaluations_per_sample,
        examples_per_prompt=consistency.examples_per_prompt,
    ),
    "endpoint_consistency": Stage(
        settings=endpoints.EndpointConsistencySettings,
        objective=endpoints.endpoint_consistency,
        evaluations_per_sample=endpoints.evaluations_per_sample,
        examples_per_prompt=endpoints.examples_per_prompt,
    ),
    "trajectory_regression": Stage(
        settings=trajectories.TrajectoryRegressionSettings,
        objective=trajectories.trajectory_regression,
        evaluations_per_sample=trajectories.evaluations_per_sample,
        examples_per_prompt=trajectories.examples_per_prompt,
    ),
}


def find(name: str) -> Stage:
    """The stage of that name.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if name not in STAGES:
        raise ValueError(f"unknown stage {name!r}; known: {', '.join(STAGES)}")
    return STAGES[name]


def build(
    name: str,
    networks: Networks,
    schedule: NoiseSchedule,
    latent_shape: tuple[int, int, int],
    settings: Any = None,
) -> Objective:
    """Builds a stage's objective, checking every setting before anything is compiled.

    Args:
      name: a key of `STAGES`.
      networks: the roles.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the stage's own settings, or None for the defaults.

    Raises:
      ValueError: unknown name, or settings that do not fit the schedule.
      TypeError: settings of another stage.
    """
    stage = find(name)
    if settings is None:
        settings = stage.settings()
    if not isinstance(settings, stage.settings):
        raise TypeError(
            f"stage {name!r} takes {stage.settings.__name__}, not {type(settings).__name__}"
        )
    return stage.objective(networks, schedule, latent_shape, settings)
