"""The roles that an objective gives to networks, as functions of the parameters.

One frozen base usually serves several roles, by the adapter it is applied with: none for the
teacher, theta for the student. An objective knows the roles and not the base: it is handed these
functions, and closed-form networks serve as well as a UNet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.prediction import Denoiser

# Latents to what is seen or said of them.
Pictures = Callable[[Float[Array, "n h w c"]], Float[Array, "n H W 3"]]
Distance = Callable[[Float[Array, "n h w c"], Float[Array, "n h w c"]], Float[Array, " n"]]
Score = Callable[[Float[Array, "n H W 3"], PyTree[Array]], Float[Array, " n"]]


@dataclass(frozen=True, kw_only=True)
class Role:
    """A network with parameters of its own, which a critic trains.

    Attributes:
      initial: `(key) -> params`.
      network: `(params, frozen)` to the network.
    """

    initial: Callable[[PRNGKeyArray], PyTree[Array]]
    network: Callable[[PyTree[Array], PyTree[Array]], Callable]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How well pictures, 0 to 1, show texts, in the scorer's own form of them.

    Attributes:
      score: `(frozen)` to the function, differentiable in the pictures.
      threshold: s0, the score of a good picture.
    """

    score: Callable[[PyTree[Array]], Score]
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Who plays which role.

    Attributes:
      student: `(trainable, frozen)` to the denoiser that is trained.
      teacher: `(frozen)` to the pre-trained denoiser, without guidance.
      null: `(frozen)` to the unconditional conditioning, leading axis 1.
      inference: the student by another route, for calls without gradients (an adapter merged
        into its base costs nothing a call); None takes `student`.
      fake: the denoiser of what the student makes.
      discriminator: `(layers)` to the network `(z, t, conditioning) -> maps of logits
        [n, h, w, 1]`, one for each of the layers, or for all if there are none.
      decode: `(frozen)` to the decoder, latents to pictures in 0 to 1.
      reward: the scorer that preference follows.
      judge: a scorer that nothing follows.
      perceptual: `(frozen)` to a distance of latents.
    """

    student: Callable[[PyTree[Array], PyTree[Array]], Denoiser]
    teacher: Callable[[PyTree[Array]], Denoiser]
    null: Callable[[PyTree[Array]], PyTree[Array]]
    inference: Callable[[PyTree[Array], PyTree[Array]], Denoiser] | None = None
    fake: Role | None = None
    discriminator: Callable[[tuple[str, ...]], Role] | None = None
    decode: Callable[[PyTree[Array]], Pictures] | None = None
    reward: Scorer | None = None
    judge: Scorer | None = None
    perceptual: Callable[[PyTree[Array]], Distance] | None = None

    def target(self, trainable: PyTree[Array], frozen: PyTree[Array]) -> Denoiser:
        """The student as it stands, for targets and rollouts.

        Stopped at the parameters, so that its graph is never traced for gradients.
        """
        return (self.inference or self.student)(jax.lax.stop_gradient(trainable), frozen)


def needed(role: Any, who: str, what: str) -> Any:
    """The role that a term cannot do without.

    Raises:
      ValueError: nobody plays it.
    """
    if role is None:
        raise ValueError(f"{who} needs {what}, and nobody plays that role")
    return role
