"""Drawing on a picture x instead of from noise alone: where to begin, and what stays.

A few-step student knows a few times, its milestones b_1 > .. > b_K, so a strength in 0 .. 1 is
snapped to the nearest of them,

    b = argmin_k |(b_k + 1) / T - strength|,    z_b = alpha_b x + sigma_b e,      (1)

and n steps are taken at n of the k' milestones from b on,

    t_i = b_{K - k' + 1 + floor(i k' / n)},    i = 0 .. n - 1,                   (2)

which is the rule of LCM (`LCMScheduler` with `strength`); from the first milestone on it is the
student's own table. What a mask m (1: drawn anew) keeps is put back after each step to a level s,
under one and the same noise e as in (1), so that it is on one straight path throughout (RePaint,
Lugmayr et al. 2022, arXiv 2201.09865, equation 8; diffusers holds e fixed as here):

    z_s <- m z_s + (1 - m) (alpha_s x + sigma_s e).                              (3)
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.timesteps import STUDENT_TIMESTEPS


def edit_timesteps(
    steps: int,
    strength: float,
    tables: Mapping[int, Sequence[int]] = STUDENT_TIMESTEPS,
    num_train_timesteps: int = 1000,
) -> tuple[int, ...]:
    """The training steps of an edit: equations (1) and (2).

    Args:
      steps: calls of the student; where fewer milestones are left from the start on, all of them.
      strength: above 0, at most 1, which is the whole way from noise.
      tables: the student's times by its number of steps; the longest holds its milestones.
      num_train_timesteps: T.

    Raises:
      ValueError: a strength or a number of steps out of range.
    """
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength = {strength:g}: must lie above 0 (the picture as it is) and at most 1 "
            "(drawn from noise)"
        )
    if steps not in tables:
        raise ValueError(f"steps = {steps}: this student samples in 1 to {max(tables)} steps")
    known = tuple(tables[max(tables)])
    # Of two as near the stronger one, which comes first.
    start = min(known, key=lambda b: round(abs((b + 1) / num_train_timesteps - strength), 9))
    left = known[known.index(start) :]
    if left == known:
        return tuple(tables[steps])
    steps = min(steps, len(left))
    return tuple(left[i * len(left) // steps] for i in range(steps))


def describe_edit(times: Sequence[int], strength: float, num_train_timesteps: int = 1000) -> str:
    """One line: what a strength was snapped to, and the steps that it gives."""
    begin = (times[0] + 1) / num_train_timesteps
    snapped = f"strength {strength:g}"
    if abs(begin - strength) > 5e-4:
        snapped += f", snapped to the student's {begin:.3g},"
    plural = "step" if len(times) == 1 else "steps"
    return f"{snapped} is {len(times)} {plural}, at {', '.join(map(str, times))}"


def begin(
    process: Process,
    picture: Float[Array, " b *latent"],
    noise: Float[Array, " b *latent"],
    t: Num[Array, ""],
) -> Float[Array, " b *latent"]:
    """Equation (1), at time `t` of the process."""
    return process.add_noise(picture, noise, jnp.full(len(picture), t))


def keep(
    z: Float[Array, " b *latent"],
    mask: Float[Array, "b h w 1"],
    picture: Float[Array, " b *latent"],
    noise: Float[Array, " b *latent"],
    level: Float[Array, " 3"],
) -> Float[Array, " b *latent"]:
    """Equation (3), after a step to a level.

    Args:
      z: latents at the level.
      mask: 1 where they stay, 0 where the picture does.
      picture: its latents, x.
      noise: e, that of the first latents.
      level: (alpha_s, d, n), a row of `Sampler.levels`: sigma_s is the length of (d, n).
    """
    alpha, direct, fresh = level
    kept = alpha * picture + jnp.hypot(direct, fresh) * noise
    return mask * z + (1 - mask) * kept
