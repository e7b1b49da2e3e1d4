"""What an objective is: how its examples are made, what is asked of them, and what they cost.

Data-free distillation makes its own examples. `produce` runs the networks without gradients, from
prompts and noise to examples; `loss` differentiates the student on them. The two are apart so
that the engine can shuffle the examples, and split them into updates, in between.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.prediction import Denoiser
from tlcm_jax.distillation.networks import Networks


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
      sample: `(examples) -> [n, h, w, c]`, the student's own sample of several steps; None where
        the objective makes none.
    """

    predict: Callable[[Denoiser, PyTree[Array]], Float[Array, "n h w c"]]
    goal: Callable[[Denoiser, PyTree[Array]], Float[Array, "n h w c"]]
    land: Callable[[Float[Array, "n h w c"], PyTree[Array]], Float[Array, "n h w c"]]
    level: Callable[[PyTree[Array]], Int[Array, " n"]]
    distance: Callable[..., tuple[Float[Array, " n"], dict[str, Array]]]
    refresh: Callable[[PyTree[Array], PRNGKeyArray], PyTree[Array]]
    sample: Callable[[PyTree[Array]], Float[Array, "n h w c"]] | None = None


@dataclass(frozen=True)
class Objective:
    """Pure functions, all fit for `jax.jit`.

    Attributes:
      produce: `(trainable, frozen, batch, key) -> examples`, without gradients. `batch` is
        `{'conditioning': pytree [b, ...]}`; `examples` a pytree with leading axis n, a multiple
        of b, whose examples are independent of each other's place; those of one prompt lie side
        by side, in the order of the batch.
      loss: `(trainable, frozen, examples, key) -> (per_sample [n], metrics)`, to be differentiated
        in its first argument; `metrics` maps names to scalars or `[n]`. With critics it gets
        their parameters by name as one more argument.
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
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        del key
        goal = parts.goal(networks.target(trainable, frozen), examples)
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

    def __add__(self, other: "Evaluations") -> "Evaluations":
        """Both together."""
        return Evaluations(
            rollout=self.rollout + other.rollout,
            teacher=self.teacher + other.teacher,
            target=self.target + other.target,
            student=self.student + other.student,
            critics=self.critics + other.critics,
        )


def batch_size(tree: PyTree[Array]) -> int:
    """The leading axis that the leaves of a batch share."""
    return jax.tree.leaves(tree)[0].shape[0]


def repeat(tree: PyTree[Array], times: int) -> PyTree[Array]:
    """Repeats each sample in place, `[b, ...]` to `[b * times, ...]`."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), tree)


def mean_square(error: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    """The mean over a sample's elements of the squared error."""
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def check_at_least(name: str, value: int | float, low: int | float) -> None:
    """Raises a ValueError if a setting is less than `low`."""
    if not value >= low:
        raise ValueError(f"{name} = {value}: must be at least {low}")


def check_positive(name: str, value: int | float) -> None:
    """Raises a ValueError if a setting is not greater than 0."""
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be greater than 0")


def check_at_most(name: str, value: int | float, high: int | float, reason: str) -> None:
    """Raises a ValueError if a setting is more than `high`, and says why it may not be."""
    if not value <= high:
        raise ValueError(f"{name} = {value}: must be at most {high}, {reason}")


def check_divides(name: str, value: int, whole: int) -> None:
    """Raises a ValueError if a setting does not divide the time axis of `whole` times."""
    if whole % value:
        near = [n for n in range(1, whole + 1) if whole % n == 0]
        below, above = max(n for n in near if n < value), min(n for n in near if n > value)
        raise ValueError(
            f"{name} = {value}: must divide the {whole} times of the schedule, as {below} and "
            f"{above} do"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError if a setting is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")
