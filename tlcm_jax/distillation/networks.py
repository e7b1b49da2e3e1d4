"""The roles that an objective gives to networks, as functions of the parameters.

One frozen base usually serves several roles, by the adapter it is applied with: none for the
teacher, theta for the student. An objective knows the roles and not the base: it is handed these
functions, and closed-form networks serve as well as a UNet.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, PyTree

from tlcm_jax.diffusion.prediction import Denoiser


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Who plays which role.

    Attributes:
      student: `(trainable, frozen)` to the denoiser that is trained.
      teacher: `(frozen)` to the pre-trained denoiser, without guidance.
      null: `(frozen)` to the unconditional conditioning, leading axis 1.
      inference: the student by another route, for calls without gradients (an adapter merged
        into its base costs nothing a call); None takes `student`.
    """

    student: Callable[[PyTree[Array], PyTree[Array]], Denoiser]
    teacher: Callable[[PyTree[Array]], Denoiser]
    null: Callable[[PyTree[Array]], PyTree[Array]]
    inference: Callable[[PyTree[Array], PyTree[Array]], Denoiser] | None = None

    def target(self, trainable: PyTree[Array], frozen: PyTree[Array]) -> Denoiser:
        """The student as it stands, for targets and rollouts.

        Stopped at the parameters, so that its graph is never traced for gradients.
        """
        return (self.inference or self.student)(jax.lax.stop_gradient(trainable), frozen)
