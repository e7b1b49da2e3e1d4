"""What an objective is: how its examples are made, what is asked of them, and what they cost.

Data-free distillation makes its own examples. `produce` runs the networks without gradients, from
prompts and noise to examples; `loss` differentiates the student on them. The two are apart so
that the engine can shuffle the examples, and split them into updates, in between.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


@dataclass(frozen=True)
class Objective:
    """A pair of pure functions, both fit for `jax.jit`.

    Attributes:
      produce: `(trainable, frozen, batch, key) -> examples`, without gradients. `batch` is
        `{'conditioning': pytree [b, ...]}`; `examples` a pytree with leading axis n, a multiple
        of b, whose examples are independent of each other's place.
      loss: `(trainable, frozen, examples, key) -> (per_sample [n], metrics)`, to be differentiated
        in its first argument; `metrics` maps names to scalars or `[n]`.
    """

    produce: Callable[..., PyTree[Array]]
    loss: Callable[..., tuple[Float[Array, " n"], dict[str, Array]]]


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Network forwards for one training example, on average (a guided call is two).

    Attributes:
      rollout: by the student, to make states.
      teacher: to make states and targets.
      target: by the student under `stop_gradient`.
      student: by the student with gradients; its backward is not counted.
    """

    rollout: float
    teacher: float
    target: float
    student: float

    @property
    def total(self) -> float:
        """All forwards."""
        return self.rollout + self.teacher + self.target + self.student


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


def check_at_most(name: str, value: int | float, high: int | float, reason: str) -> None:
    """Raises a ValueError if a setting is more than `high`, and says why it may not be."""
    if not value <= high:
        raise ValueError(f"{name} = {value}: must be at most {high}, {reason}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError if a setting is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")
