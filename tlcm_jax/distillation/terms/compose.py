"""How other terms join a consistency loss: a weighted sum that meets at the student's x0.

Preference, distribution matching, the adversarial term and the perceptual distance all see the
student through one thing, its prediction x = f(z_m, t_m). So

    L = L_c(x) + sum_k w_k L_k(x),    G = dL_c/dx + sum_k w_k c_k dL_k/dx,       (1)

and the student's gradient is G passed back through its own network, once, whatever the number of
terms. Two things follow. No term can send a gradient anywhere else: to the teacher, the decoder,
a scorer or a critic. And gradients can be compared where they meet: a term with a `share` s is
scaled down, sample by sample, to

    c_k = min(1, s |dL_c/dx| / |w_k dL_k/dx|),                                   (2)

so that it never outweighs consistency (c_k = 1 for the others).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import (
    Critic,
    Evaluations,
    Objective,
    Parts,
    batch_size,
    repeat,
)


class Examples(NamedTuple):
    """Examples of a composed objective.

    Attributes:
      pairs: those of the consistency objective.
      extras: what a batch holds besides its conditioning, `[n, ...]` each.
    """

    pairs: Any
    extras: dict[str, PyTree[Array]]


class Made(NamedTuple):
    """What the student makes of one micro-batch, for critics and terms to look at.

    Attributes:
      x0: `[n, h, w, c]` its prediction.
      landing: `[n, h, w, c]` what is to meet the goal, at time `level`; x0 itself in stage 2.
      goal: `[n, h, w, c]` the consistency loss's target; None where no term asked for it.
      sample: `[n, h, w, c]` its own sample of several steps, or a real one; None where there is
        neither.
      level: `[n]` time of landing and goal; 0 counts as clean.
      conditioning: pytree `[n, ...]`.
    """

    x0: Float[Array, "n h w c"]
    landing: Float[Array, "n h w c"]
    goal: Float[Array, "n h w c"] | None
    sample: Float[Array, "n h w c"] | None
    level: Int[Array, " n"]
    conditioning: PyTree[Array]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of (1).

    Attributes:
      weight: w_k.
      loss: `(made, extras, frozen, critics, key) -> (per_sample [n], metrics)`, to be
        differentiated in `made`'s x0 and landing.
      share: s of (2); None leaves the gradient as it is.
      critics: whom it trains beside the student, by name.
      evaluations: network forwards a sample that it adds, but for those of `show`.
      needs: fields of `Made` that it cannot do without.
    """

    weight: float
    loss: Callable[..., tuple[Float[Array, " n"], dict[str, Array]]]
    share: float | None = None
    critics: Mapping[str, Critic] = field(default_factory=dict)
    evaluations: Evaluations = Evaluations()
    needs: tuple[str, ...] = ()


def evaluations_of(terms: Mapping[str, Term]) -> Evaluations:
    """Forwards a sample that terms add to those of the consistency objective."""
    rounds = max([c.updates for term in terms.values() for c in term.critics.values()], default=0)
    # What the critics see is made once for all of them.
    shown = rounds * (2.0 if _goal_is_shown(terms) else 1.0)
    return sum((term.evaluations for term in terms.values()), Evaluations(rollout=shown))


def composed(base: Objective, networks: Networks, terms: Mapping[str, Term]) -> Objective:
    """A consistency objective with terms beside its loss.

    Args:
      base: an objective in parts.
      networks: the roles.
      terms: by name; none gives `base` back.

    Returns:
      The objective. Its examples are `Examples`. Its metrics are those of `base`;
      `consistency/gradient`, the norm of dL_c/dx over a sample; and of each term its own,
      `NAME/loss` before the weight and `NAME/gradient`, the norm after weight and share.

    Raises:
      ValueError: a term that `base` makes nothing for, or two critics of one name.
    """
    if not terms:
        return base
    if base.parts is None:
        raise ValueError(f"terms {list(terms)} can only join a consistency objective")
    parts: Parts = base.parts
    critics: dict[str, Critic] = {}
    for name, term in terms.items():
        if "sample" in term.needs and parts.sample is None:
            raise ValueError(
                f"term {name!r} compares with the student's own sample of several steps, which "
                "only endpoint_consistency makes, or with a real one, which segment_consistency "
                "has in mode 'data'"
            )
        clash = set(critics) & set(term.critics)
        if clash:
            raise ValueError(f"two terms train a critic called {sorted(clash)}: keep one")
        critics |= term.critics
    goal_is_shown = _goal_is_shown(terms)
    if goal_is_shown and parts.average:
        raise ValueError("critics are shown the student's own goal, not its average's: target")

    def produce(
        trainable: PyTree[Array], frozen: PyTree[Array], batch: PyTree[Array], key: PRNGKeyArray
    ) -> Examples:
        pairs = base.produce(trainable, frozen, batch, key)
        # What the base has read of a batch is in its own examples.
        extras = {k: v for k, v in batch.items() if k not in ("conditioning", "latents")}
        copies = batch_size(pairs) // batch_size(batch["conditioning"])
        return Examples(pairs, repeat(extras, copies))

    def made(x0: Float[Array, "n h w c"], goal: Float[Array, "n h w c"] | None, pairs: Any) -> Made:
        return Made(
            x0=x0,
            landing=parts.land(x0, pairs),
            goal=goal,
            sample=None if parts.sample is None else parts.sample(pairs),
            level=parts.level(pairs),
            conditioning=pairs.conditioning,
        )

    def loss(
        trainable: PyTree[Array],
        frozen: PyTree[Array],
        examples: Examples,
        key: PRNGKeyArray,
        seen: Mapping[str, PyTree[Array]] | None = None,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        pairs, extras = examples
        goal = parts.goal(networks.target(parts.asked(trainable, seen), frozen), pairs)
        x0 = parts.predict(networks.student(trainable, frozen), pairs)
        here = jax.lax.stop_gradient(x0)

        total, gradient, metrics = at(lambda x: parts.distance(x, goal, pairs), here)
        norm = norms(gradient)
        metrics = {**metrics, "consistency/gradient": norm}
        keys = dict(zip(sorted(terms), jax.random.split(key, len(terms)), strict=True))
        for name, term in terms.items():

            def of_term(x: Array, name: str = name, term: Term = term) -> tuple:
                return term.loss(made(x, goal, pairs), extras, frozen, seen or {}, keys[name])

            value, pull, told = at(of_term, here)
            pull = term.weight * pull
            size = norms(pull)
            if term.share is not None:
                limit = jnp.minimum(1.0, term.share * norm / jnp.maximum(size, 1e-30))
                pull, size = limit[:, None, None, None] * pull, limit * size
            total = total + term.weight * value
            gradient = gradient + pull
            metrics |= {f"{name}/{what}": number for what, number in told.items()}
            metrics |= {f"{name}/loss": value, f"{name}/gradient": size}
        # Zero in value; (1) in its gradient.
        anchor = jnp.sum(jax.lax.stop_gradient(gradient) * (x0 - here), axis=(1, 2, 3))
        return jax.lax.stop_gradient(total) + anchor, metrics

    def show(trainable: PyTree[Array], frozen: PyTree[Array]) -> Callable:
        student = networks.target(trainable, frozen)

        def look(examples: Examples, key: PRNGKeyArray) -> Made:
            pairs = parts.refresh(examples.pairs, key)
            goal = parts.goal(student, pairs) if goal_is_shown else None
            return made(parts.predict(student, pairs), goal, pairs)

        return look

    return Objective(
        produce=produce,
        loss=loss,
        parts=parts,
        critics=critics,
        show=show if critics else None,
    )


def at(
    loss: Callable[[Array], tuple[Float[Array, " n"], dict[str, Array]]],
    x: Float[Array, "n h w c"],
) -> tuple[Float[Array, " n"], Float[Array, "n h w c"], dict[str, Array]]:
    """A loss at x: its value per sample, each value's gradient in its own x, and its metrics."""

    def total(x: Array) -> tuple[Array, tuple]:
        value, metrics = loss(x)
        return jnp.sum(value), (value, metrics)

    gradient, (value, metrics) = jax.grad(total, has_aux=True)(x)
    return value, gradient, metrics


def norms(x: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    """The Euclidean norm of each sample."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3)))


def _goal_is_shown(terms: Mapping[str, Term]) -> bool:
    return any(term.critics and "goal" in term.needs for term in terms.values())
