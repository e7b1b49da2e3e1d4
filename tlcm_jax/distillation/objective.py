"""What an objective is: how its examples are made, what is asked of them, and what they cost.

Data-free distillation makes its own examples. `produce` runs the networks without gradients, from
prompts and noise to examples; `loss` differentiates the student on them. The two are apart so
that the engine can shuffle the examples, and split them into updates, in between.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.prediction import Denoiser
from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.training.update import AVERAGE


@dataclass(frozen=True, kw_only=True)
class Critic:
    """A network trained beside the student, on what the student makes.

    Attributes:
      initial: `(key) -> params`.
      loss: `(params, frozen, shown, key) -> (per_sample [n], metrics)`.
      updates: before each of the student's.
      learning_rate: constant.
      b1: decay of the first moment of its AdamW.
    """

    initial: Callable[[PRNGKeyArray], PyTree[Array]]
    loss: Callable[..., tuple[Float[Array, " n"], dict[str, Array]]]
    updates: int
    learning_rate: float
    b1: float


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A consistency loss taken apart at the student's x0, so that other terms can join it there.

    Attributes:
      predict: `(denoiser, examples) -> x0 [n, h, w, c]`, the student's prediction.
      goal: `(target denoiser, examples) -> [n, h, w, c]`, without gradients.
      land: `(x0, examples) -> [n, h, w, c]`, what is to meet the goal: where a jump with `x0` ends.
      level: `(examples) -> [n]`, the time of the goal; 0 counts as clean.
      distance: `(x0, goal, examples) -> (per_sample [n], metrics)`, the loss.
      refresh: `(examples, key) -> examples` whose states have fresh noise, as far as they can.
      sample: `(examples) -> [n, h, w, c]`, what the prediction should look like: the student's
        own sample of several steps, or a real one; None where the objective has neither.
      average: whether the goal asks the student's average in place of the student.
    """

    predict: Callable[[Denoiser, PyTree[Array]], Float[Array, "n h w c"]]
    goal: Callable[[Denoiser, PyTree[Array]], Float[Array, "n h w c"]]
    land: Callable[[Float[Array, "n h w c"], PyTree[Array]], Float[Array, "n h w c"]]
    level: Callable[[PyTree[Array]], Int[Array, " n"]]
    distance: Callable[..., tuple[Float[Array, " n"], dict[str, Array]]]
    refresh: Callable[[PyTree[Array], PRNGKeyArray], PyTree[Array]]
    sample: Callable[[PyTree[Array]], Float[Array, "n h w c"]] | None = None
    average: bool = False

    def asked(
        self, trainable: PyTree[Array], seen: Mapping[str, PyTree[Array]] | None
    ) -> PyTree[Array]:
        """Whose parameters the goal is asked of."""
        return (seen or {})[AVERAGE] if self.average else trainable


@dataclass(frozen=True)
class Objective:
    """Pure functions, all fit for `jax.jit`.

    Attributes:
      produce: `(trainable, frozen, batch, key) -> examples`, without gradients. `batch` is
        `{'conditioning': pytree [b, ...]}`, and `{'latents': [b, h, w, c]}` beside it where the
        settings ask for real ones; `examples` a pytree with leading axis n, a multiple
        of b, whose examples are independent of each other's place; those of one prompt lie side
        by side, in the order of the batch.
      loss: `(trainable, frozen, examples, key) -> (per_sample [n], metrics)`, to be differentiated
        in its first argument; `metrics` maps names to scalars or `[n]`. With critics it gets
        their parameters by name as one more argument, and the student's average with them where
        one is kept.
      parts: of a consistency loss; None where `loss` is all there is.
      critics: who is trained beside the student.
      show: `(trainable, frozen) -> (examples, key) -> shown`, without gradients: what the critics
        see of one micro-batch. Needed where there are critics.
    """

    produce: Callable[..., PyTree[Array]]
    loss: Callable[..., tuple[Float[Array, " n"], dict[str, Array]]]
    parts: Parts | None = None
    critics: Mapping[str, Critic] = field(default_factory=dict)
    show: Callable[..., Callable[..., PyTree[Array]]] | None = None


def consistency(networks: Networks, produce: Callable, parts: Parts) -> Objective:
    """The objective whose loss is the distance of its parts alone."""

    def loss(
        trainable: PyTree[Array],
        frozen: PyTree[Array],
        examples: PyTree[Array],
        key: PRNGKeyArray,
        seen: Mapping[str, PyTree[Array]] | None = None,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        del key
        goal = parts.goal(networks.target(parts.asked(trainable, seen), frozen), examples)
        x0 = parts.predict(networks.student(trainable, frozen), examples)
        return parts.distance(x0, goal, examples)

    return Objective(produce=produce, loss=loss, parts=parts)


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Network forwards for one training example, on average (a guided call is two).

    Attributes:
      rollout: by the student, to make states.
      teacher: to make states and targets.
      target: by the student under `stop_gradient`.
      student: by the student with gradients; its backward is not counted.
      critics: by critics, in their own updates and in the student's.
    """

    rollout: float = 0.0
    teacher: float = 0.0
    target: float = 0.0
    student: float = 0.0
    critics: float = 0.0

    @property
    def total(self) -> float:
        """All forwards."""
        return self.rollout + self.teacher + self.target + self.student + self.critics

    def over(self, epochs: int) -> "Evaluations":
        """For an example that is made once and visited `epochs` times."""
        return Evaluations(
            rollout=self.rollout,
            teacher=self.teacher,
            target=epochs * self.target,
            student=epochs * self.student,
            critics=epochs * self.critics,
        )

    def __mul__(self, times: int) -> "Evaluations":
        """All of them so many times."""
        return Evaluations(**{name: times * count for name, count in asdict(self).items()})

    def __add__(self, other: "Evaluations") -> "Evaluations":
        """Both together."""
        theirs = asdict(other)
        return Evaluations(**{name: count + theirs[name] for name, count in asdict(self).items()})


def batch_size(tree: PyTree[Array]) -> int:
    """The leading axis that the leaves of a batch share."""
    return jax.tree.leaves(tree)[0].shape[0]


def repeat(tree: PyTree[Array], times: int) -> PyTree[Array]:
    """Repeats each sample in place, `[b, ...]` to `[b * times, ...]`."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), tree)


def mean_square(error: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    """The mean over a sample's elements of the squared error."""
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def pseudo_huber(error: Float[Array, "n h w c"], c: float) -> Float[Array, " n"]:
    """The mean over a sample's elements of sqrt(error^2 + c^2) - c, c > 0.

    Quadratic below c and linear above it. The distance of latent consistency models (arXiv
    2310.04378) and of SCott (arXiv 2403.01505).
    """
    return jnp.mean(jnp.sqrt(jnp.square(error) + c * c) - c, axis=(1, 2, 3))


def snr_weight(schedule: NoiseSchedule, t: Int[Array, " n"], limit: float) -> Float[Array, " n"]:
    """The weight min(SNR + 1, limit) of an error in x0 at times t; a limit of 1 weighs all alike.

    Multistep consistency models (Heek et al. 2024, arXiv 2403.06807), whose limit is 5.
    """
    snr = jnp.square(schedule.alpha(t) / schedule.sigma(t))[:, 0, 0, 0]
    return jnp.minimum(snr + 1, limit)
