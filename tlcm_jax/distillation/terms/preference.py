"""Preference: decoded predictions are to please a scorer that has learnt what people like.

TLCM (arXiv 2406.05768), with s a scorer of pictures and texts, D the VAE's decoder, x the
student's prediction, c its prompt and c' another sample's,

    L = relu(s0 - s(D(x), c)) + relu(s(D(x), c')).                               (1)

A scorer can be pleased in ways that people are not. So the term's gradient is held to a share of
the consistency loss's (terms.py, equation 2), and a second scorer that nothing follows is told
beside the first: `parted` says when the one rises while the other falls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.checks import check_at_least, check_at_most
from tlcm_jax.distillation.networks import Networks, needed
from tlcm_jax.distillation.terms.compose import Made, Term

# Where a batch holds the prompts as the scorers read them.
REWARD_TEXTS, JUDGE_TEXTS = "reward_texts", "judge_texts"


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """The choices of the term.

    Attributes:
      weight: beside the consistency loss; 1 in the paper.
      share: of the consistency gradient's norm at x that the term's may have.
      scorer: the one that is followed, a name in `evaluation.scorers.table.SCORERS`, or a
        plug-in's dotted one.
      weights: the folder of its weights.
      threshold: s0, above which a picture is good enough; None is the scorer's own. One that the
        teacher's pictures pass already leaves the student nothing to learn.
      judge: one that is not; empty tells none.
      judge_weights: its folder.
      stop_when_parted: end the stage when the judge has fallen by more than `tolerance`, in its
        own units, while the scorer rose.
      tolerance: see there.
    """

    weight: float = 1.0
    share: float = 0.3
    scorer: str
    weights: str
    threshold: float | None = None
    judge: str = ""
    judge_weights: str = ""
    stop_when_parted: bool = False
    tolerance: float = 0.0

    def __post_init__(self):
        check_at_least("weight", self.weight, 0)
        check_at_least("share", self.share, 0)
        check_at_most("share", self.share, 1, "the whole of the consistency gradient")
        check_at_least("tolerance", self.tolerance, 0)
        if self.stop_when_parted and not self.judge:
            raise ValueError("stop_when_parted needs a judge: name one")
        if self.judge and (self.judge, self.judge_weights) == (self.scorer, self.weights):
            raise ValueError("judge: the scorer cannot judge itself; name another")


def preference(networks: Networks, schedule: NoiseSchedule, settings: PreferenceSettings) -> Term:
    """The term.

    Args:
      networks: decoder and reward; the judge if the settings name one.
      schedule: not used; terms are built alike.
      settings: the choices.

    Returns:
      A term that reads its texts from the batch: `reward_texts` and, with a judge, `judge_texts`.
      Its metrics are `score` and `judge`.

    Raises:
      ValueError: a role that nobody plays.
    """
    del schedule
    decode = needed(networks.decode, "preference", "a decoder")
    reward = needed(networks.reward, "preference", "a scorer")
    judge = needed(networks.judge, "preference", "a judge") if settings.judge else None
    enough = reward.threshold if settings.threshold is None else settings.threshold

    def loss(
        made: Made,
        extras: Mapping[str, PyTree[Array]],
        frozen: PyTree[Array],
        critics: PyTree[Array],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        del critics, key
        texts = extras[REWARD_TEXTS]
        others = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), texts)
        # A decoder's activations are the largest of all: made twice rather than kept.
        images = jax.checkpoint(decode(frozen))(made.x0)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), texts, others)
        # The pictures are common to both texts: what the scorer does with them it does once.
        score, other = jax.vmap(reward.score(frozen), in_axes=(None, 0))(images, both)
        strange = jnp.logical_not(_same(texts, others))
        value = jax.nn.relu(enough - score) + strange * jax.nn.relu(other)  # (1)
        metrics = {"score": score}
        if judge is not None:
            seen = jax.lax.stop_gradient(images)
            metrics["judge"] = judge.score(frozen)(seen, extras[JUDGE_TEXTS])
        return value, metrics

    return Term(weight=settings.weight, loss=loss, share=settings.share)


def parted(
    settings: PreferenceSettings, term: str = "preference", rows: int = 5
) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """When to end a stage: the judge has fallen while the scorer that is followed rose.

    Args:
      settings: `stop_when_parted` and `tolerance`.
      term: the term's name, before its metrics'.
      rows: how many rows of metrics are averaged, at the stage's start and at its end.

    Returns:
      `(the stage's rows) -> why it should end, or ""`.
    """

    def enough(history: Sequence[Mapping[str, Any]]) -> str:
        if not settings.stop_when_parted or len(history) < 2 * rows:
            return ""
        changes = []
        for name in ("score", "judge"):
            column = [row[f"{term}/{name}"] for row in history]
            changes.append(float(np.mean(column[-rows:]) - np.mean(column[:rows])))
        score, judge = changes
        if score > 0 and judge < -settings.tolerance:
            return (
                f"the judge fell by {-judge:.3g} while the scorer rose by {score:.3g} "
                f"(tolerance {settings.tolerance:g})"
            )
        return ""

    return enough


def _same(texts: PyTree[Array], others: PyTree[Array]) -> Array:
    """Whether two samples' texts are equal, `[n]`: prompts of one rollout may be neighbours."""
    equal = [
        jnp.all((a == b).reshape(len(a), -1), axis=1)
        for a, b in zip(jax.tree.leaves(texts), jax.tree.leaves(others), strict=True)
    ]
    return jnp.all(jnp.stack(equal), axis=0)
