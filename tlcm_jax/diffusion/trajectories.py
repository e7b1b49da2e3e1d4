"""The teacher's walk along a list of falling times.

It leaves from noise, or from any latent, by guided deterministic steps (process.py, equation 3):

    x_k = x_w(z_k, t_k),   z_{k+1} = step(z_k, x_k, t_k -> t_{k+1}),              (1)

and every point costs one guided call, whatever is done with its x0 afterwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from tlcm_jax.diffusion.guidance import Denoiser
from tlcm_jax.diffusion.process import Process


class TrajectoryPoints(NamedTuple):
    """The k points of a walk at which the teacher was called, time-major.

    Attributes:
      z: `[k, b, *latent]` latents.
      t: `[k, b]` their times.
      x0: `[k, b, *latent]` the denoiser's output there.
    """

    z: Float[Array, "k b *latent"]
    t: Num[Array, "k b"]
    x0: Float[Array, "k b *latent"]


def teacher_path(
    denoiser: Denoiser,
    process: Process,
    z: Float[Array, " b *latent"],
    times: Num[Array, "b stops"],
    conditioning: PyTree[Array],
) -> tuple[TrajectoryPoints, Float[Array, " b *latent"]]:
    """Equation (1) along `times`, in lock-step over the batch, as one `lax.scan`.

    Args:
      denoiser: the guided teacher.
      process: of the teacher.
      z: latents at `times[:, 0]`.
      times: falling times of each path, `[b, k + 1]`; at equal neighbours nothing moves.
      conditioning: the denoiser's, leading axis b.

    Returns:
      The k points at `times[:, :-1]`, after exactly k calls of `denoiser`, and the latents at
      `times[:, -1]`, where it is not called.
    """

    def advance(z, stop):
        t, s = stop
        x0 = denoiser(z, t, conditioning)
        return process.step(z, x0, t, s), TrajectoryPoints(z, t, x0)

    z = z.astype(jnp.float32)
    last, points = jax.lax.scan(advance, z, (times[:, :-1].T, times[:, 1:].T))
    return points, last
