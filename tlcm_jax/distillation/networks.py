"""The roles that an objective gives to networks, as functions of the parameters.

One frozen base usually serves several roles, by the adapter it is applied with: none for the
teacher, theta for the student. An objective knows the roles and not the base: it is handed these
functions, and closed-form networks serve as well as a UNet.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, PyTree

from tlcm_jax.diffusion.prediction import Denoiser


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Who plays which role.

    Attributes:
      student: `(trainable, frozen)` to the denoiser that is trained; with its trainable leaves
        under `stop_gradient` it is the target too.
      teacher: `(frozen)` to the pre-trained denoiser, without guidance.
      null: `(frozen)` to the unconditional conditioning, leading axis 1.
    """

    student: Callable[[PyTree[Array], PyTree[Array]], Denoiser]
    teacher: Callable[[PyTree[Array]], Denoiser]
    null: Callable[[PyTree[Array]], PyTree[Array]]
