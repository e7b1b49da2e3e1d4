"""Networks that a recipe's terms need besides the pipeline: scorers, a perceptual distance.

They are loaded before anything is compiled, so that what is missing is said at once; their weights
join the frozen tree, and their functions the roles.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from tlcm_jax.config.schema import Settings, StageSettings
from tlcm_jax.distillation.networks import Scorer
from tlcm_jax.distillation.terms.preference import JUDGE_TEXTS, REWARD_TEXTS
from tlcm_jax.evaluation.scorers.base import Scorer as Reward
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.families.stable_diffusion import Pipeline
from tlcm_jax.io.latent_lpips_files import is_latent_lpips, load_latent_lpips
from tlcm_jax.models.latent_lpips import LatentLPIPS, channels_of

_SCORERS, _PERCEPTUAL = "scorers", "perceptual"


@dataclasses.dataclass(frozen=True)
class Companions:
    """What was loaded for a recipe.

    Attributes:
      rewards: by their name and folder.
      perceptual: networks and weights of the distances, by folder.
    """

    rewards: Mapping[tuple[str, str], Reward] = dataclasses.field(default_factory=dict)
    perceptual: Mapping[str, tuple[LatentLPIPS, Any]] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        """All weights, for the frozen tree."""
        return {
            _SCORERS: {_key(*which): reward.params for which, reward in self.rewards.items()},
            _PERCEPTUAL: {folder: params for folder, (_, params) in self.perceptual.items()},
        }

    def terms(self, stage: StageSettings) -> dict[str, Any]:
        """A stage's terms, but for the perceptual one where its weights are missing."""
        return {
            name: chosen
            for name, chosen in stage.terms.items()
            if name != "latent_lpips" or chosen.weights in self.perceptual
        }

    def roles(self, stage: StageSettings, pipeline: Pipeline) -> dict[str, Any]:
        """Who plays `decode`, `reward`, `judge` and `perceptual` in a stage (`Networks`)."""
        found: dict[str, Any] = {}
        chosen = stage.terms.get("preference")
        if chosen is not None:
            found["decode"] = lambda frozen: functools.partial(
                pipeline.decode_latents, {"vae": frozen["vae"]}
            )
            for role, which in _scorers(chosen).items():
                if which in self.rewards:
                    found[role] = _scorer(self.rewards[which], _key(*which))
        chosen = stage.terms.get("latent_lpips")
        if chosen is not None and chosen.weights in self.perceptual:
            network, params = self.perceptual[chosen.weights]
            _check_channels(chosen.weights, params, pipeline.vae.config.latent_channels)
            found["perceptual"] = lambda frozen: functools.partial(
                network.apply, {"params": frozen[_PERCEPTUAL][chosen.weights]}
            )
        return found

    def texts(self, stage: StageSettings, prompts: Sequence[str]) -> dict[str, Any]:
        """Prompts as the stage's scorers read them, by the names that `preference` looks under."""
        chosen = stage.terms.get("preference")
        if chosen is None:
            return {}
        names = {"reward": REWARD_TEXTS, "judge": JUDGE_TEXTS}
        return {
            names[role]: self.rewards[which].texts(prompts)
            for role, which in _scorers(chosen).items()
        }


def load_companions(settings: Settings) -> Companions:
    """Loads all that the terms of a recipe name.

    Raises:
      ValueError: an unknown scorer, or one without a gradient to follow.
      FileNotFoundError: a scorer's weights are missing. (Where those of the perceptual distance
        are, its term is left out and a warning says so.)
    """
    rewards: dict[tuple[str, str], Reward] = {}
    perceptual: dict[str, tuple[LatentLPIPS, Any]] = {}
    missing: set[str] = set()
    for stage in settings.stages.values():
        chosen = stage.terms.get("preference")
        if chosen is not None:
            for role, which in _scorers(chosen).items():
                if which not in rewards:
                    rewards[which] = load_scorer(*which, differentiable=role == "reward")
            followed = rewards[chosen.scorer, chosen.weights]
            if followed.threshold is None and chosen.threshold is None:
                raise ValueError(
                    f"scorer {chosen.scorer!r} knows no score that is good enough: set the "
                    "preference term's `threshold`"
                )
        chosen = stage.terms.get("latent_lpips")
        if chosen is None:
            continue
        if is_latent_lpips(chosen.weights):
            perceptual[chosen.weights] = load_latent_lpips(chosen.weights)
        else:
            missing.add(chosen.weights)
    for folder in sorted(missing):
        logging.warning(
            "no latent LPIPS in %s: the consistency losses are the mean square alone; train one "
            "with `python -m miniature.train_latent_lpips`",
            Path(folder),
        )
    return Companions(rewards, perceptual)


def _check_channels(folder: str, params: Any, channels: int) -> None:
    """Raises a ValueError if a latent LPIPS was trained for other latents than the model's."""
    seen = channels_of(params)
    if seen != channels:
        raise ValueError(
            f"{folder}: a latent LPIPS for {seen} channels, where this model's latents have "
            f"{channels}; train one with `python -m miniature.train_latent_lpips`"
        )


def _scorers(chosen: Any) -> dict[str, tuple[str, str]]:
    """Names and folders of a preference term's scorers, by role."""
    found = {"reward": (chosen.scorer, chosen.weights)}
    if chosen.judge:
        found["judge"] = (chosen.judge, chosen.judge_weights)
    return found


def _scorer(reward: Reward, key: str) -> Scorer:
    return Scorer(
        score=lambda frozen: functools.partial(reward.score, frozen[_SCORERS][key]),
        threshold=math.nan if reward.threshold is None else reward.threshold,
    )


def _key(name: str, folder: str) -> str:
    return f"{name}:{folder}"
