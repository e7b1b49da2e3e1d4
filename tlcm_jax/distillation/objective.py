"""What an objective is: how its pairs are made, what is asked of them, and what they cost.

Data-free distillation makes its own data. `sample_pairs` runs the networks without gradients, from
prompts and noise to pairs; `loss` compares the student's prediction with a target. The two are
apart so that pairs can be shuffled, stored, and gone through again, in between.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PyTree

from tlcm_jax.diffusion.guidance import Denoiser
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.distillation.networks import Frozen, Networks, Params

# Folded into a key for what is drawn beside the objective's own; far from what `split` counts.
_DROPPED = 0x6E756C6C


class Pairs(NamedTuple):
    """Two points of a trajectory: where the student is asked, and where its target is.

    Attributes:
      z_m: `[n, *latent]` the noisier latent, at time `t_m`, `[n]`; what the student sees.
      z_n: `[n, *latent]` the cleaner one, at time `t_n`, `[n]`; what the target is made from.
      target_time: `[n]` the time at which the two are compared.
      sample: `[n, *latent]` what the student's prediction should look like: its own sample of
        several steps, or a real latent; None where there is neither.
      conditioning: pytree `[n, ...]`.
      inputs: pytree `[n, ...]`, what else the batch held, such as prompts as a scorer reads them.
      next_state: `[n, *latent]` where the student's own sampler went from z_m, at time `next_time`,
        `[n]`; at the process's end it is `sample`. None where z_m is no state of its sampler.
    """

    z_m: Float[Array, " n *latent"]
    t_m: Num[Array, " n"]
    z_n: Float[Array, " n *latent"]
    t_n: Num[Array, " n"]
    target_time: Num[Array, " n"]
    sample: Float[Array, " n *latent"] | None
    conditioning: PyTree[Array]
    inputs: dict[str, PyTree[Array]] = {}
    next_state: Float[Array, " n *latent"] | None = None
    next_time: Num[Array, " n"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFE:
    """Network forwards (number of function evaluations) a pair, on average; a guided call is two.

    Attributes:
      rollout: by the student, to make states.
      teacher: to make states and targets.
      target: by the student under `stop_gradient`.
      student: by the student with gradients; its backward is not counted.
      aux: by auxiliary networks, in their own updates and in the student's.
    """

    rollout: float = 0.0
    teacher: float = 0.0
    target: float = 0.0
    student: float = 0.0
    aux: float = 0.0

    @property
    def total(self) -> float:
        """All forwards."""
        return sum(dataclasses.asdict(self).values())

    def visited(self, epochs: int) -> "NFE":
        """For a pair that is made once and visited `epochs` times."""
        return NFE(
            rollout=self.rollout,
            teacher=self.teacher,
            target=epochs * self.target,
            student=epochs * self.student,
            aux=epochs * self.aux,
        )

    def __add__(self, other: "NFE") -> "NFE":
        """Both together."""
        theirs = dataclasses.asdict(other)
        return NFE(**{name: count + theirs[name] for name, count in vars(self).items()})


@dataclasses.dataclass(frozen=True)
class Objective:
    """A consistency objective on given networks; its methods are fit for `jax.jit`.

    Attributes:
      settings: the objective's own choices.
      networks: of the stage.
      needs_latents: batches must hold real latents under "latents".
      uses_student: pairs depend on the student's parameters.
      has_sample: pairs have a `sample`.
      has_next_state: pairs have a `next_state`, drawn with all noise fresh.
      has_next_time: pairs have a `next_time`.
      target_is_ema: targets are asked of the student's EMA, which the stage must then keep.
      weight: 0 where the stage has its terms alone, and no target.
      has_distance: False where a term stands in the place of the objective's own distance.
    """

    settings: Any
    networks: Networks

    needs_latents: ClassVar[bool] = False
    uses_student: ClassVar[bool] = False
    has_sample: ClassVar[bool] = False
    has_next_state: ClassVar[bool] = False
    has_next_time: ClassVar[bool] = False
    target_is_ema: ClassVar[bool] = False
    weight: ClassVar[float] = 1.0
    has_distance: ClassVar[bool] = True

    @property
    def pair_settings(self) -> dict[str, Any]:
        """Of the settings, as plain values, those that `sample_pairs` depends on."""
        return dataclasses.asdict(self.settings)

    @property
    def pairs_per_prompt(self) -> int:
        """Pairs that one prompt of a batch makes."""
        raise NotImplementedError

    @property
    def nfe_per_pair(self) -> NFE:
        """Network forwards that a pair costs."""
        raise NotImplementedError

    def sample_pairs(
        self, trainable: Params, frozen: Frozen, batch: Mapping[str, Any], keys: Key[Array, " b"]
    ) -> Pairs:
        """Pairs of a batch of b prompts, without gradients.

        Args:
          trainable: the student's parameters.
          frozen: what is not trained.
          batch: `{"conditioning": pytree [b, ...]}`, and "latents" `[b, *latent]` where needed.
          keys: one for each prompt, `[b]`.

        Returns:
          `b * pairs_per_prompt` pairs; those of one prompt lie side by side, in the batch's order.
        """
        raise NotImplementedError

    def predict(self, student: Denoiser, pairs: Pairs) -> Float[Array, " n *latent"]:
        """The student's x0 at the noisier point."""
        return student(pairs.z_m, pairs.t_m, pairs.conditioning)

    def target(self, denoiser: Denoiser, pairs: Pairs) -> Float[Array, " n *latent"]:
        """What the student's jump is to meet, without gradients."""
        raise NotImplementedError

    def jump(self, x0: Float[Array, " n *latent"], pairs: Pairs) -> Float[Array, " n *latent"]:
        """Where the prediction takes z_m, at `target_time`; x0 itself unless overridden."""
        del pairs
        return x0

    def loss(
        self,
        x0: Float[Array, " n *latent"],
        target: Float[Array, " n *latent"],
        pairs: Pairs,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """The consistency loss of each pair, and metrics, scalars or `[n]`."""
        raise NotImplementedError

    def renoise(self, pairs: Pairs, keys: Key[Array, " n"]) -> Pairs:
        """The pairs with fresh noise in z_m, as far as that is possible, for auxiliary networks."""
        del keys
        return pairs


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LatentShape:
    """The shape of one sample's latents, in a batch under `LATENT_SHAPE`: static to `jax.jit`."""

    shape: tuple[int, ...]


# In batches of images of several sizes; others are of the networks' own.
LATENT_SHAPE = "latent_shape"


def of_shape(objective: Objective, batch: Mapping[str, Any]) -> Objective:
    """The objective on networks whose latents are of a batch's shape."""
    if LATENT_SHAPE not in batch:
        return objective
    shape = batch[LATENT_SHAPE].shape
    networks = dataclasses.replace(objective.networks, latent_shape=shape)
    return dataclasses.replace(objective, networks=networks)


def batch_size(tree: PyTree[Array]) -> int:
    """The leading axis that the leaves of a batch share."""
    return jax.tree.leaves(tree)[0].shape[0]


def repeat(tree: PyTree[Array], times: int) -> PyTree[Array]:
    """Repeats each sample in place, `[b, ...]` to `[b * times, ...]`."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), tree)


def drop_prompts(
    conditioning: PyTree[Array], null: PyTree[Array], keys: Key[Array, " b"], share: float
) -> PyTree[Array]:
    """A share of a batch without its prompts, so that the student keeps an unconditional answer.

    Args:
      conditioning: `[b, ...]`.
      null: that of no prompt, leading axis b or 1.
      keys: of the batch; what else is drawn with them does not depend on the share.
      share: 0 .. 1.
    """
    own = jax.vmap(lambda key: jax.random.fold_in(key, _DROPPED))(keys)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, share))(own)
    return jax.tree.map(
        lambda without, given: jnp.where(bcast_right(dropped, given), without, given),
        null,
        conditioning,
    )


def split(keys: Key[Array, " b"], parts: int) -> tuple[Key[Array, " b"], ...]:
    """Splits each sample's key, `[b]`, into `parts` keys `[b]` that are each used once."""
    return tuple(jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, parts))(keys), 1, 0))
