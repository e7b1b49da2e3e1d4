"""Preference: decoded predictions are to please scorers that have learnt what people like.

TLCM (arXiv 2406.05768) has one scorer, MPS; here there may be several. With s_k a scorer of images
and texts, w_k its weight and s0_k its threshold, D the decoder, x the student's prediction, c its
prompt and c' another sample's,

    L = sum_k w_k (relu(s0_k - s_k(D(x), c)) + relu(s_k(D(x), c'))).             (1)

Scorers differ in their units, which weights and thresholds are in. The term's gradient is held to a
share of the consistency loss's (compose.py, equation 2), and a scorer that nothing follows, the
held-out reward, is reported beside them (scored.py). A scorer without a gradient is followed by
another term (reward.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.terms.base import Context, StudentOutputs, Term
from tlcm_jax.distillation.terms.scored import (
    ScoredSettings,
    ScorerSettings,
    followed,
    reward_hacking,
)
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.lora import LoRAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikedSettings(ScorerSettings):
    """A scorer of (1).

    Attributes:
      threshold: s0, above which an image is good enough; None is the scorer's own. One that the
        teacher's images pass already leaves the student nothing to learn.
    """

    threshold: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(ScoredSettings):
    """The choices of the term.

    Attributes:
      max_grad_ratio: of the consistency gradient's norm at x that the term's may have.
      scorers: those that are followed, by a name that is also in their metrics.
      optional: a run goes without those scorers, and a held-out one, whose weights are not on disk
        (`config/optional_terms.py`), and without the term where none is left.
    """

    max_grad_ratio: float = 0.3
    optional: bool = False
    scorers: Mapping[str, LikedSettings]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("max_grad_ratio", self.max_grad_ratio, 0)
        check_at_most(
            "max_grad_ratio", self.max_grad_ratio, 1, "the whole of the consistency gradient"
        )
        followed(self.scorers, self)

    def load(self, model: LatentModel, networks: Networks, adapter: LoRAConfig) -> "Preference":
        """See `TermSettings`."""
        del model, adapter
        liked = {}
        for key, chosen in followed(self.scorers, self).items():
            scorer = load_scorer(chosen.scorer, chosen.weights, differentiable=True)
            threshold = scorer.threshold if chosen.threshold is None else chosen.threshold
            if threshold is None:
                raise ValueError(
                    f"scorer {chosen.scorer!r} has no threshold of its own: set "
                    f"preference.scorers.{key}.threshold"
                )
            liked[key] = Liked(scorer=scorer, weight=chosen.weight, threshold=threshold)
        params = {"scorers": {key: each.scorer.params for key, each in liked.items()}}
        held_out = None
        if self.held_out:
            held_out = load_scorer(self.held_out, self.held_out_weights)
            if type(held_out).score is Scorer.score:
                raise ValueError(
                    f"held_out: scorer {self.held_out!r} scores on the host, and preference on the "
                    "device; name another, or hold it out beside a `reward` term"
                )
            params["held_out"] = held_out.params
        return Preference(
            weight=self.weight,
            max_grad_ratio=self.max_grad_ratio,
            params=params,
            settings=self,
            networks=networks,
            liked=liked,
            held_out=held_out,
        )


class Liked(NamedTuple):
    """A scorer of (1), loaded: s_k, w_k and s0_k."""

    scorer: Scorer
    weight: float
    threshold: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Term):
    """Equation (1); its metrics are each scorer's `KEY/score` and `KEY/loss`, and `held_out`.

    Attributes:
      settings: the choices.
      networks: whose decoder is used.
      liked: the scorers that are followed, by key; their weights are `params["scorers"]`.
      held_out: the one that is not; its weights are `params["held_out"]`.
    """

    settings: PreferenceSettings
    networks: Networks
    liked: Mapping[str, Liked]
    held_out: Scorer | None = None

    def prompt_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The prompts as the scorers read them."""
        inputs = {
            "scorers": {key: liked.scorer.texts(prompts) for key, liked in self.liked.items()}
        }
        if self.held_out is not None:
            inputs["held_out"] = self.held_out.texts(prompts)
        return inputs

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        if self.networks.decode is None:
            raise ValueError("preference needs a decoder, and the model has none")
        # A decoder's activations are the largest of all: made twice rather than kept.
        images = jax.checkpoint(self.networks.decode(context.frozen))(outputs.x0)
        value = jnp.zeros(len(outputs.x0))
        metrics: dict[str, Array] = {}
        for key, (scorer, weight, threshold) in self.liked.items():
            prompts = context.inputs["scorers"][key]
            negatives = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), prompts)
            both = jax.tree.map(lambda a, b: jnp.stack([a, b]), prompts, negatives)
            # The images are common to both texts: what the scorer does with them it does once.
            score, negative = jax.vmap(scorer.score, in_axes=(None, None, 0))(
                context.params["scorers"][key], images, both
            )
            part = losses.preference(score, negative, threshold, _differs(prompts, negatives))
            value = value + weight * part  # (1)
            metrics |= {f"{key}/score": score, f"{key}/loss": part}
        if self.held_out is not None:
            metrics["held_out"] = self.held_out.score(
                context.params["held_out"],
                jax.lax.stop_gradient(images),
                context.inputs["held_out"],
            )
        return value, metrics

    def should_stop(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> str:
        """Reward hacking: the held-out reward has fallen while a scorer rose."""
        if not self.settings.stop_on_reward_hacking:
            return ""
        return reward_hacking(rows, prefix, self.liked, self.settings.tolerance)


def _differs(prompts: PyTree[Array], negatives: PyTree[Array]) -> Bool[Array, " n"]:
    """Whether two samples' texts differ: prompts of one rollout may be neighbours."""
    different = [
        jnp.any((a != b).reshape(len(a), -1), axis=1)
        for a, b in zip(jax.tree.leaves(prompts), jax.tree.leaves(negatives), strict=True)
    ]
    return jnp.any(jnp.stack(different), axis=0)
