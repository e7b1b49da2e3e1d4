"""Preference: decoded predictions are to please a scorer that has learnt what people like.

TLCM (arXiv 2406.05768), with s a scorer of images and texts, D the decoder, x the student's
prediction, c its prompt and c' another sample's,

    L = relu(s0 - s(D(x), c)) + relu(s(D(x), c')).                               (1)

A scorer can be pleased in ways that people are not (reward hacking). So the term's gradient is
held to a share of the consistency loss's (compose.py, equation 2), and a second scorer that
nothing follows, the held-out reward, is reported beside the first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.terms.base import Context, StudentOutputs, Term
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.lora import LoRAConfig

# Rows of metrics that are averaged at a stage's start and at its end.
_ROWS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """The choices of the term.

    Attributes:
      weight: beside the consistency loss; 1 in the paper.
      max_grad_ratio: of the consistency gradient's norm at x that the term's may have.
      scorer: the one that is followed: a name in `evaluation.scorers.table.SCORERS`, or a
        plug-in's dotted one.
      weights: the folder or file of its weights.
      threshold: s0, above which an image is good enough; None is the scorer's own. One that the
        teacher's images pass already leaves the student nothing to learn.
      held_out: a scorer that is not followed; empty reports none.
      held_out_weights: its folder or file.
      stop_on_reward_hacking: end the stage when the held-out reward has fallen by more than
        `tolerance`, in its own units, while the scorer rose.
      tolerance: see there.
    """

    weight: float = 1.0
    max_grad_ratio: float = 0.3
    scorer: str
    weights: str
    threshold: float | None = None
    held_out: str = ""
    held_out_weights: str = ""
    stop_on_reward_hacking: bool = False
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("weight", self.weight, 0)
        check_at_least("max_grad_ratio", self.max_grad_ratio, 0)
        check_at_most(
            "max_grad_ratio", self.max_grad_ratio, 1, "the whole of the consistency gradient"
        )
        check_at_least("tolerance", self.tolerance, 0)
        if self.stop_on_reward_hacking and not self.held_out:
            raise ValueError("stop_on_reward_hacking needs a held_out scorer: name one")
        if self.held_out and (self.held_out, self.held_out_weights) == (self.scorer, self.weights):
            raise ValueError("held_out: the scorer cannot be its own check; name another")

    def load(self, model: LatentModel, networks: Networks, adapter: LoRAConfig) -> "Preference":
        """See `TermSettings`."""
        del model, adapter
        scorer = load_scorer(self.scorer, self.weights, differentiable=True)
        threshold = scorer.threshold if self.threshold is None else self.threshold
        if threshold is None:
            raise ValueError(f"scorer {self.scorer!r} has no threshold of its own: set `threshold`")
        held_out = None
        params = {"scorer": scorer.params}
        if self.held_out:
            held_out = load_scorer(self.held_out, self.held_out_weights)
            params["held_out"] = held_out.params
        return Preference(
            weight=self.weight,
            max_grad_ratio=self.max_grad_ratio,
            params=params,
            settings=self,
            networks=networks,
            scorer=scorer,
            threshold=threshold,
            held_out=held_out,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Term):
    """Equation (1); its metrics are `score` and `held_out`.

    Attributes:
      settings: the choices.
      networks: whose decoder is used.
      scorer: the one that is followed; its weights are `params["scorer"]`.
      threshold: s0 of (1).
      held_out: the one that is not; its weights are `params["held_out"]`.
    """

    settings: PreferenceSettings
    networks: Networks
    scorer: Scorer
    threshold: float
    held_out: Scorer | None = None

    def prompt_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The prompts as the scorers read them."""
        inputs = {"scorer": self.scorer.texts(prompts)}
        if self.held_out is not None:
            inputs["held_out"] = self.held_out.texts(prompts)
        return inputs

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        if self.networks.decode is None:
            raise ValueError("preference needs a decoder, and the model has none")
        prompts = context.inputs["scorer"]
        negatives = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), prompts)
        # A decoder's activations are the largest of all: made twice rather than kept.
        images = jax.checkpoint(self.networks.decode(context.frozen))(outputs.x0)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), prompts, negatives)
        # The images are common to both texts: what the scorer does with them it does once.
        score, negative = jax.vmap(
            lambda texts: self.scorer.score(context.params["scorer"], images, texts)
        )(both)
        value = losses.preference(
            score, negative, self.threshold, _differs(prompts, negatives)
        )  # (1)
        metrics = {"score": score}
        if self.held_out is not None:
            metrics["held_out"] = self.held_out.score(
                context.params["held_out"],
                jax.lax.stop_gradient(images),
                context.inputs["held_out"],
            )
        return value, metrics

    def should_stop(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> str:
        """Reward hacking: the held-out reward has fallen while the scorer rose."""
        if not self.settings.stop_on_reward_hacking or len(rows) < 2 * _ROWS:
            return ""
        score, held_out = (
            float(np.mean(column[-_ROWS:]) - np.mean(column[:_ROWS]))
            for column in (
                [row[f"{prefix}/{name}"] for row in rows] for name in ("score", "held_out")
            )
        )
        if score > 0 and held_out < -self.settings.tolerance:
            return (
                f"the held-out reward fell by {-held_out:.3g} while the scorer rose by {score:.3g} "
                f"(tolerance {self.settings.tolerance:g})"
            )
        return ""


def _differs(prompts: PyTree[Array], negatives: PyTree[Array]) -> Bool[Array, " n"]:
    """Whether two samples' texts differ: prompts of one rollout may be neighbours."""
    different = [
        jnp.any((a != b).reshape(len(a), -1), axis=1)
        for a, b in zip(jax.tree.leaves(prompts), jax.tree.leaves(negatives), strict=True)
    ]
    return jnp.any(jnp.stack(different), axis=0)
