"""The tables of stages and terms: a recipe names them, this file knows where they live.

A stage is one consistency objective and any number of terms beside its loss. A new objective is
one file beside this one and one line in `STAGES`; a new term likewise, in `TERMS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation import lcd as endpoints
from tlcm_jax.distillation import mlcd as consistency
from tlcm_jax.distillation import trajectory_kd as trajectories
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import Evaluations, Objective
from tlcm_jax.distillation.terms import adversarial, distribution_matching, preference
from tlcm_jax.distillation.terms import latent_lpips as perceptual
from tlcm_jax.distillation.terms.compose import Term, composed, evaluations_of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of objective.

    Attributes:
      settings: its frozen dataclass of choices, whose defaults are the paper's.
      objective: `(networks, schedule, latent_shape, settings) -> Objective`.
      evaluations_per_sample: `(settings) -> Evaluations`, the forwards that one example costs.
      examples_per_prompt: `(settings) -> int`, how many examples a prompt of a batch makes.
      needs_latents: `(settings) -> bool`, whether batches must hold real latents.
    """

    settings: type
    objective: Callable[..., Objective]
    evaluations_per_sample: Callable[[Any], Evaluations]
    examples_per_prompt: Callable[[Any], int]
    needs_latents: Callable[[Any], bool] = lambda settings: False


STAGES = {
    "segment_consistency": Stage(
        settings=consistency.SegmentConsistencySettings,
        objective=consistency.segment_consistency,
        evaluations_per_sample=consistency.evaluations_per_sample,
        examples_per_prompt=consistency.examples_per_prompt,
        needs_latents=consistency.needs_latents,
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


@dataclass(frozen=True, kw_only=True)
class TermKind:
    """One kind of term.

    Attributes:
      settings: its frozen dataclass of choices.
      term: `(networks, schedule, settings) -> Term`.
    """

    settings: type
    term: Callable[..., Term]


TERMS = {
    "latent_lpips": TermKind(settings=perceptual.PerceptualSettings, term=perceptual.perceptual),
    "preference": TermKind(settings=preference.PreferenceSettings, term=preference.preference),
    "distribution_matching": TermKind(
        settings=distribution_matching.DistributionMatchingSettings,
        term=distribution_matching.distribution_matching,
    ),
    "adversarial": TermKind(settings=adversarial.AdversarialSettings, term=adversarial.adversarial),
}


def find_term(name: str) -> TermKind:
    """The term of that name.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if name not in TERMS:
        raise ValueError(f"unknown term {name!r}; known: {', '.join(TERMS)}")
    return TERMS[name]


def evaluations(
    name: str, settings: Any, terms: Mapping[str, Term] | None = None, epochs: int = 1
) -> Evaluations:
    """Network forwards that one example of a stage costs, those of its terms included.

    It is made once; what is asked of it is asked in each of its `epochs`.
    """
    own = find(name).evaluations_per_sample(settings)
    return own.over(epochs) + evaluations_of(terms or {}) * epochs


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
    terms: Mapping[str, Term] | None = None,
) -> Objective:
    """Builds a stage's objective, checking every setting before anything is compiled.

    Args:
      name: a key of `STAGES`.
      networks: the roles.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the stage's own settings, or None for the defaults.
      terms: what joins its loss, by name; see `build_terms`.

    Raises:
      ValueError: unknown name, settings that do not fit the schedule, or a term that the
        objective makes nothing for.
      TypeError: settings of another stage.
    """
    stage = find(name)
    if settings is None:
        settings = stage.settings()
    if not isinstance(settings, stage.settings):
        raise TypeError(
            f"stage {name!r} takes {stage.settings.__name__}, not {type(settings).__name__}"
        )
    if getattr(settings, "weight", 1.0) == 0:
        _check_without_goal(name, terms or {})
    base = stage.objective(networks, schedule, latent_shape, settings)
    return composed(base, networks, terms or {})


def _check_without_goal(name: str, terms: Mapping[str, Term]) -> None:
    """Raises a ValueError unless a stage of weight 0, without a goal, has terms that need none."""
    if not terms:
        raise ValueError(f"stage {name!r} of weight 0 asks nothing of the student: give it terms")
    unfit = [one for one, term in terms.items() if term.share is not None or "goal" in term.needs]
    if unfit:
        raise ValueError(
            f"weight = 0: the stage then has no goal and no gradient of its own, which "
            f"{', '.join(unfit)} is held against; give it a weight, or leave the term out"
        )


def build_terms(
    networks: Networks, schedule: NoiseSchedule, settings: Mapping[str, Any]
) -> dict[str, Term]:
    """Builds the terms of a stage, checking every setting before anything is compiled.

    Args:
      networks: the roles.
      schedule: the teacher's noise schedule.
      settings: each term's own settings, by name. A term of weight 0 is left out.

    Raises:
      ValueError: unknown name, settings that do not fit, or a role that nobody plays.
    """
    terms = {}
    for name, chosen in settings.items():
        kind = find_term(name)
        if chosen.weight > 0:
            terms[name] = kind.term(networks, schedule, chosen)
    return terms
