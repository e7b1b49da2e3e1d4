"""How terms join a consistency loss: a weighted sum that meets at the student's x0.

Preference, distribution matching, the adversarial term and latent LPIPS all see the student
through one thing, its prediction x = f(z_m, t_m). So

    L = L_c(x) + sum_k w_k L_k(x),    G = dL_c/dx + sum_k w_k c_k dL_k/dx,       (1)

and the student's gradient is G passed back through its own network, once, whatever the number of
terms. Two things follow. No term can send a gradient anywhere else: to the teacher, the decoder,
a scorer or an auxiliary network. And gradients can be compared where they meet: a term with a
`max_grad_ratio` r is scaled down, sample by sample, to

    c_k = min(1, r |dL_c/dx| / |w_k dL_k/dx|),                                   (2)

so that it never outweighs consistency (c_k = 1 for the others).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.distillation.losses import norm_per_sample
from tlcm_jax.distillation.networks import TERMS, AuxNetwork, Frozen, Params
from tlcm_jax.distillation.objective import NFE, Objective, Pairs, split
from tlcm_jax.distillation.terms.base import Context, StudentOutputs, Term

# The name under which a loss is given the student's own EMA.
EMA = "ema"


@dataclasses.dataclass(frozen=True)
class StageLoss:
    """An objective with terms beside its loss: what a stage trains.

    Attributes:
      objective: the consistency objective.
      terms: by name; there may be none.

    Raises:
      ValueError: a term that the objective makes nothing for, two auxiliary networks of one name,
        or a stage that asks nothing of the student.
    """

    objective: Objective
    terms: Mapping[str, Term] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known: set[str] = set()
        for name, term in self.terms.items():
            if "sample" in term.needed_outputs and not self.objective.has_sample:
                raise ValueError(
                    f"term {name!r} compares with the student's own sample of several steps, which "
                    "only the objective 'lcd' makes, or with a real one, which 'mlcd' has in mode "
                    "'data'"
                )
            if "next_state" in term.needed_outputs and not self.objective.has_next_state:
                raise ValueError(
                    f"term {name!r} follows the random steps of the student's own sampler: take "
                    "the objective 'lcd' with states = 'visited' and rollout_gamma = 1"
                )
            if "next_time" in term.needed_outputs and not self.objective.has_next_time:
                raise ValueError(
                    f"term {name!r} looks at the segments of the student's own trajectory: take "
                    "the objective 'lcd' with states = 'visited'"
                )
            if term.aux is not None and term.aux.name in known:
                raise ValueError(f"two terms train a network called {term.aux.name!r}: keep one")
            known |= set() if term.aux is None else {term.aux.name}
        if self.objective.target_is_ema and self._aux_needs_target:
            raise ValueError(
                "auxiliary networks are shown the student's own target, not its EMA's: set target "
                "= 'student'"
            )
        if self.objective.weight == 0:
            self._check_without_target()
        elif not self.objective.has_distance:
            self._check_without_distance()

    def _check_without_target(self) -> None:
        if not self.terms:
            raise ValueError("weight = 0: the stage asks nothing of the student: give it terms")
        unfit = [
            name
            for name, term in self.terms.items()
            if term.max_grad_ratio is not None or "target" in term.needed_outputs
        ]
        if unfit:
            raise ValueError(
                f"weight = 0: the stage then has no target and no gradient of its own, which "
                f"{', '.join(unfit)} is held against; give it a weight, or leave the term out"
            )

    def _check_without_distance(self) -> None:
        if not any("target" in term.needed_outputs for term in self.terms.values()):
            raise ValueError(
                "distance = 'none': no term compares with the target in its place: give latent "
                "LPIPS, or take distance = 'square'"
            )
        held = [name for name, term in self.terms.items() if term.max_grad_ratio is not None]
        if held:
            raise ValueError(
                "distance = 'none': the stage then has no gradient of its own, which "
                f"{', '.join(held)} is held against; leave the term out"
            )

    @property
    def _aux_needs_target(self) -> bool:
        return any(t.aux is not None and "target" in t.needed_outputs for t in self.terms.values())

    @property
    def aux(self) -> dict[str, AuxNetwork]:
        """The auxiliary networks of the terms, by name."""
        found = (term.aux for term in self.terms.values())
        return {network.name: network for network in found if network is not None}

    @property
    def nfe_per_pair(self) -> NFE:
        """Forwards a pair, of objective and terms."""
        rounds = max((network.updates for network in self.aux.values()), default=0)
        # What auxiliary networks are shown is made once for all of them.
        shown = NFE(rollout=rounds * (2.0 if self._aux_needs_target else 1.0))
        own = self.objective.nfe_per_pair
        return sum((term.nfe for term in self.terms.values()), own + shown)

    def prompt_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the terms read of the prompts, by term: numpy arrays `[n, ...]`."""
        found = {name: term.prompt_inputs(prompts) for name, term in self.terms.items()}
        return {name: inputs for name, inputs in found.items() if inputs}

    def should_stop(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """The first term's reason to end the stage after these rows of metrics, or ""."""
        return next(filter(None, (t.should_stop(rows, name) for name, t in self.terms.items())), "")

    def __call__(
        self,
        trainable: Params,
        frozen: Frozen,
        pairs: Pairs,
        keys: Key[Array, " n"],
        others: Mapping[str, Params],
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (1), to be differentiated in `trainable`.

        Args:
          trainable: the student's parameters.
          frozen: what is not trained.
          pairs: a batch.
          keys: one for each pair, `[n]`.
          others: parameters of the auxiliary networks by name, and the student's EMA as `EMA`.

        Returns:
          The loss of each pair, and metrics: those of the objective; with terms,
          `consistency/grad_norm`, the norm of dL_c/dx over a sample, and of each term its own,
          `NAME/loss` before the weight and `NAME/grad_norm` after weight and ratio.
        """
        objective, networks = self.objective, self.objective.networks
        target_params = others[EMA] if objective.target_is_ema else trainable
        target = objective.target(networks.target(target_params, frozen), pairs)
        x0 = objective.predict(networks.student(trainable, frozen), pairs)
        if not self.terms:
            return objective.loss(x0, target, pairs)
        here = jax.lax.stop_gradient(x0)
        total, gradient, metrics = value_and_grad_at(
            lambda x: objective.loss(x, target, pairs), here
        )
        norm = norm_per_sample(gradient)
        metrics = {**metrics, "consistency/grad_norm": norm}
        for name, keys_ in zip(sorted(self.terms), split(keys, len(self.terms)), strict=True):
            term = self.terms[name]
            context = Context(
                frozen=frozen,
                params=frozen.get(TERMS, {}).get(name, {}),
                inputs=pairs.inputs.get(name, {}),
                aux_params=others,
                keys=keys_,
            )

            def term_loss(x: Array, term: Term = term, context: Context = context) -> tuple:
                return term.loss(self._outputs(x, target, pairs), context)

            value, term_grad, term_metrics = value_and_grad_at(term_loss, here)
            term_grad = term.weight * term_grad
            size = norm_per_sample(term_grad)
            if term.max_grad_ratio is not None:
                limit = jnp.minimum(1.0, term.max_grad_ratio * norm / jnp.maximum(size, 1e-30))
                term_grad, size = bcast_right(limit, term_grad) * term_grad, limit * size
            total = total + term.weight * value
            gradient = gradient + term_grad
            metrics |= {f"{name}/{key}": number for key, number in term_metrics.items()}
            metrics |= {f"{name}/loss": value, f"{name}/grad_norm": size}
        # Zero in value; (1) in its gradient.
        surrogate = jax.lax.stop_gradient(gradient) * (x0 - here)
        surrogate = jnp.sum(surrogate.reshape(len(x0), -1), axis=1)
        return jax.lax.stop_gradient(total) + surrogate, metrics

    def aux_batch(
        self, trainable: Params, frozen: Frozen, pairs: Pairs, keys: Key[Array, " n"]
    ) -> StudentOutputs:
        """What auxiliary networks are shown of a batch, with fresh noise where it can be."""
        objective = self.objective
        student = objective.networks.target(trainable, frozen)
        pairs = objective.renoise(pairs, keys)
        target = objective.target(student, pairs) if self._aux_needs_target else None
        x0 = objective.predict(student, pairs)
        return jax.lax.stop_gradient(self._outputs(x0, target, pairs))

    def _outputs(self, x0: Array, target: Array | None, pairs: Pairs) -> StudentOutputs:
        return StudentOutputs(
            x0=x0,
            jump=self.objective.jump(x0, pairs),
            target=target,
            sample=pairs.sample,
            target_time=pairs.target_time,
            conditioning=pairs.conditioning,
            next_state=pairs.next_state,
            next_time=pairs.next_time,
            z_m=pairs.z_m,
            t_m=pairs.t_m,
        )


def value_and_grad_at(
    loss: Callable[[Array], tuple[Float[Array, " n"], dict[str, Array]]],
    x: Float[Array, " n *latent"],
) -> tuple[Float[Array, " n"], Float[Array, " n *latent"], dict[str, Array]]:
    """A loss at x: its value per sample, each value's gradient in its own x, and its metrics."""

    def total(x: Array) -> tuple[Array, tuple]:
        value, metrics = loss(x)
        return jnp.sum(value), (value, metrics)

    gradient, (value, metrics) = jax.grad(total, has_aux=True)(x)
    return value, gradient, metrics
