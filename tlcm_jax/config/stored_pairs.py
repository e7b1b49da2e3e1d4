"""What a stage's pairs depend on, and pairs that were drawn before in the place of new ones."""

from collections.abc import Mapping
from typing import Any

from tlcm_jax.config.schema import Settings
from tlcm_jax.data.pair_store import PairStore
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.training.workdir import differing_keys

# May differ from the recipe that trains on them: another order of prompts, and other noise.
_FREE = ("stream_seed",)


def stream_seed(settings: Settings, name: str) -> int:
    """Of the order of a stage's prompts: the second does not begin where the first began."""
    return 1000 * settings.seed + list(settings.stages).index(name)


def describe_pairs(settings: Settings, name: str, loss: StageLoss) -> dict[str, Any]:
    """What the pairs of a stage depend on, but for the contents of files."""
    objective, stage = loss.objective, settings.stages[name]
    return {
        "objective": stage.objective,
        "settings": objective.pair_settings,
        "latent_shape": list(objective.networks.latent_shape),
        "prompts_per_refill": stage.refill,
        "stream_seed": stream_seed(settings, name),
    }


def check_storable(where: str, settings: Settings, name: str, loss: StageLoss) -> None:
    """Raises a ValueError unless a stage's pairs depend on prompts, noise and teacher alone."""
    stage, objective = settings.stages[name], loss.objective
    reasons = {
        "they depend on the student": objective.uses_student,
        "they are made of real latents": objective.needs_latents,
        "they are of several sizes (model.buckets)": bool(settings.model.buckets),
        "some are made without their prompts (unconditional)": stage.unconditional > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{where}: its pairs cannot be stored: {reason}")


def open_pairs(settings: Settings, name: str, loss: StageLoss) -> PairStore | None:
    """The stored pairs that a stage asks for; None where it draws its own.

    Raises:
      FileNotFoundError: there are none.
      ValueError: they are not whole, or were drawn otherwise than the recipe says.
    """
    stage = settings.stages[name]
    if not stage.paths:
        return None
    where = f"stages.{name}.paths = {stage.paths!r}"
    check_storable(where, settings, name, loss)
    store = PairStore(stage.paths)
    store.check_whole()
    _compare(where, store.described, describe_pairs(settings, name, loss))
    return store


def check_contents(where: str, store: PairStore, contents: Mapping[str, Any]) -> None:
    """Raises a ValueError unless pairs were drawn with the same prompts and teacher.

    Args:
      where: how the message names them.
      store: the pairs.
      contents: of the run's own files (`Inputs.contents`).
    """
    _compare(where, {"inputs": store.described.get("inputs")}, {"inputs": contents})


def _compare(where: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    shared = {key: stored.get(key) for key in wanted if key not in _FREE}
    ours = {key: value for key, value in wanted.items() if key not in _FREE}
    changes = differing_keys(shared, ours)
    if changes:
        told = "; ".join(f"{key}: {change}" for key, change in changes.items())
        raise ValueError(f"{where}: they were drawn otherwise (theirs -> the recipe's): {told}")
