"""Sampling: the student's few stochastic steps, and the teacher's many deterministic ones.

Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1): from noise at
t_1 = T-1, at each t_i of a short falling table predict x0 and go to the next level s = t_{i+1},

    z_s = alpha_s x0 + d eps + n xi,    xi ~ N(0, I) fresh,                      (1)

where eps is the student's own prediction. How much of the noise is fresh is gamma's choice, as in
trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159): go deterministically to
the lower level s' = floor((1 - gamma) s), then up to s again by forward diffusion,

    d = alpha_s sigma_s' / alpha_s',    n^2 = 1 - (alpha_s / alpha_s')^2.         (2)

Level s' = 0 counts as clean data (alpha 1, sigma 0), so gamma = 1 is d = 0, n = sigma_s: TLCM's
sampler, each x0 re-noised. gamma = 0 is s' = s: deterministic DDIM. The last step goes to clean
data, alpha_s = 1 and d = n = 0: its result is x0 itself. The student needs no guidance.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion import prediction
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.prediction import Denoiser
from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.diffusion.trajectories import teacher_path

# The authors' inference release: each row a subset of the eight milestones of T = 1000.
_TIMESTEPS = {
    1: (999,),
    2: (999, 499),
    3: (999, 499, 124),
    4: (999, 749, 499, 124),
    5: (999, 749, 499, 249, 124),
    6: (999, 749, 499, 374, 249, 124),
    7: (999, 749, 624, 499, 374, 249, 124),
    8: (999, 874, 749, 624, 499, 374, 249, 124),
}


def timesteps_for(steps: int) -> tuple[int, ...]:
    """The times at which the student is called, for 1 to 8 steps.

    Raises:
      ValueError: another number of steps.
    """
    if steps not in _TIMESTEPS:
        raise ValueError(f"steps = {steps}: a distilled model samples in 1 to 8 steps")
    return _TIMESTEPS[steps]


def sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    conditioning: PyTree[Array],
    timesteps: Sequence[int],
    key: PRNGKeyArray | None = None,
    gamma: float = 1.0,
    noises: Float[Array, "renoisings b h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """Draws latents with a distilled model: equations (1) and (2), as one `lax.scan`.

    The result is a pure function of its arguments; to jit it, close over `denoiser`, `schedule`,
    `timesteps` and `gamma`, which are Python values.

    Args:
      denoiser: the student, called once a step on the batch as it is.
      schedule: the noise schedule.
      noise: unit Gaussian, the latent at `timesteps[0]`.
      conditioning: the denoiser's, leading axis b.
      timesteps: falling times, such as `timesteps_for(4)`.
      key: source of the fresh noise, drawn at step i from `fold_in(key, i)`; not needed with one
        step, with `gamma` 0 or with `noises`.
      gamma: in 0 .. 1, the share of fresh noise.
      noises: the fresh noise itself, one less than there are steps, for comparing with another
        implementation on the same noise.

    Returns:
      The last step's x0: latents as the VAE's decoder expects them, times its scaling factor.

    Raises:
      ValueError: times that do not fall or lie outside the schedule, gamma outside 0 .. 1,
        fresh noise needed and neither `key` nor `noises` given, or too few or many `noises`.
    """
    plan = levels(schedule, tuple(timesteps), gamma)
    renoisings = len(timesteps) - 1
    noise = noise.astype(jnp.float32)
    if noises is not None:
        if len(noises) != renoisings:
            raise ValueError(f"{len(timesteps)} steps need {renoisings} noises, got {len(noises)}")
        noises = jnp.concatenate([noises, jnp.zeros_like(noise)[None]])
    elif not np.any(plan[:, 2]):
        noises = jnp.zeros((len(timesteps), 1, 1, 1, 1), noise.dtype)
    elif key is None:
        raise ValueError("several steps with gamma > 0 draw fresh noise: pass key or noises")

    def advance(z, xs):
        index, t, level, xi = xs
        if xi is None:
            xi = jax.random.normal(jax.random.fold_in(key, index), z.shape)
        return student_step(denoiser, schedule, z, t, level, xi, conditioning), None

    xs = (
        jnp.arange(len(timesteps)),
        jnp.asarray(timesteps, jnp.int32),
        jnp.asarray(plan, jnp.float32),
        noises,
    )
    return jax.lax.scan(advance, noise, xs)[0]


def student_step(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    t: Int[Array, ""],
    level: Float[Array, " 3"],
    xi: Float[Array, "#b #h #w #c"],
    conditioning: PyTree[Array],
) -> Float[Array, "b h w c"]:
    """One step of `sample`, equation (1): from the latents `z` at time `t` to the next level.

    Time and level are arrays, so that all steps can share one compiled function.

    Args:
      denoiser: the student.
      schedule: the noise schedule.
      z: latents at time `t`.
      t: the time, of all of them.
      level: (alpha_s, d, n) of the next level, a row of `levels`.
      xi: fresh unit Gaussian noise.
      conditioning: the denoiser's, leading axis b.
    """
    alpha_s, direct, fresh = level
    t = jnp.full(z.shape[:1], t)
    eps = denoiser(z, t, conditioning)
    x0 = prediction.x0_from_eps(schedule, z, eps, t)
    return alpha_s * x0 + direct * eps + fresh * xi


def levels(
    schedule: NoiseSchedule, timesteps: tuple[int, ...], gamma: float
) -> Float[np.ndarray, "steps 3"]:
    """(alpha_s, d, n) of equations (1) and (2) for each step's next level s.

    Raises:
      ValueError: times that do not fall or lie outside the schedule, or gamma outside 0 .. 1.
    """
    check_timesteps(schedule, timesteps)
    check_gamma(gamma)
    rows = []
    for s in timesteps[1:]:
        lower = int((1 - gamma) * s)
        alpha_s, sigma_s = float(schedule.alphas[s]), float(schedule.sigmas[s])
        if lower == 0 and gamma > 0:
            rows.append((alpha_s, 0.0, sigma_s))
            continue
        alpha_lower, sigma_lower = float(schedule.alphas[lower]), float(schedule.sigmas[lower])
        fresh = np.sqrt(max(0.0, 1 - (alpha_s / alpha_lower) ** 2))
        rows.append((alpha_s, alpha_s * sigma_lower / alpha_lower, fresh))
    return np.asarray([*rows, (1.0, 0.0, 0.0)])


def check_gamma(gamma: float) -> None:
    """Raises a ValueError unless gamma lies in 0 .. 1."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma}: must lie in 0 (deterministic) to 1 (all noise fresh)")


def check_timesteps(
    schedule: NoiseSchedule, timesteps: tuple[int, ...], name: str = "timesteps"
) -> None:
    """Raises a ValueError unless `timesteps` fall strictly, inside the schedule."""
    last = schedule.train_steps - 1
    falls = all(t > s for t, s in zip(timesteps, timesteps[1:], strict=False))
    if not timesteps or not falls or timesteps[0] > last or timesteps[-1] < 0:
        raise ValueError(f"{name} = {timesteps}: must fall strictly, inside 0 .. {last}")


def teacher_timesteps(
    steps: int, train_steps: int = 1000, spacing: str = "trailing"
) -> tuple[int, ...]:
    """The times of diffusers' `DDIMScheduler` (Lin et al. 2023, arXiv 2305.08891, table 2).

    Args:
      steps: number of steps, 1 .. T.
      train_steps: T.
      spacing: "trailing", which begins at T - 1, where pure noise is; or "leading" with
        `steps_offset` 1, Stable Diffusion's default, which ends at 1. Where `steps` does not
        divide T, `DDIMScheduler` steps to a time one off the one it calls next with
        "trailing"; here every step ends where the next begins.

    Raises:
      ValueError: another spacing or number of steps.
    """
    if not 1 <= steps < train_steps:
        raise ValueError(f"steps = {steps}: the teacher samples in 1 to {train_steps - 1} steps")
    if spacing == "trailing":
        times = np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1
    elif spacing == "leading":
        times = np.arange(steps)[::-1] * (train_steps // steps) + 1
    else:
        raise ValueError(f"spacing = {spacing!r}: supported are 'trailing' and 'leading'")
    return tuple(int(t) for t in times)


def sample_teacher(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "b h w c"],
    conditioning: PyTree[Array],
    null: PyTree[Array],
    steps: int = 25,
    scale: float = 8.0,
    spacing: str = "trailing",
) -> Float[Array, "b h w c"]:
    """Draws latents with the undistilled model: DDIM with classifier-free guidance.

    The last step goes to time 0, as diffusers' `DDIMScheduler` does with `set_alpha_to_one`
    false, which is what Stable Diffusion's configs say.

    Args:
      denoiser: the teacher without guidance.
      schedule: the noise schedule.
      noise: unit Gaussian, the latent at the first time.
      conditioning: the denoiser's, leading axis b.
      null: the unconditional conditioning, leading axis 1.
      steps: number of guided calls.
      scale: w of classifier-free guidance.
      spacing: as in `teacher_timesteps`.

    Returns:
      Latents at time 0.
    """
    stops = (*teacher_timesteps(steps, schedule.train_steps, spacing), 0)
    times = jnp.broadcast_to(jnp.asarray(stops, jnp.int32), (noise.shape[0], len(stops)))
    teacher = guided(denoiser, scale, null)
    return teacher_path(teacher, schedule, noise, times, conditioning)[1]
