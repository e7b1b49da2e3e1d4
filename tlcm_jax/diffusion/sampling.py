"""Sampling: the student's few stochastic steps, and the teacher's many deterministic ones.

Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1): from noise at
the noisiest time, at each t_i of a short falling table predict x0 and go to the next level
s = t_{i+1},

    z_s = alpha_s x0 + d eps + n xi,    xi ~ N(0, I) fresh,                      (1)

where eps is the one that x0 implies. How much of the noise is fresh is gamma's choice, as in
trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159): go deterministically to
the lower level s' = floor((1 - gamma) s), then up to s again by forward diffusion,

    d = alpha_s sigma_s' / alpha_s',    n^2 = sigma_s^2 - d^2.                    (2)

Level s' = 0 counts as clean data (alpha 1, sigma 0), so gamma = 1 is d = 0, n = sigma_s: TLCM's
sampler, each x0 re-noised. gamma = 0 is s' = s: deterministic. The last step goes to clean data,
alpha_s = 1 and d = n = 0: its result is x0 itself. The student needs no guidance.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, PyTree

from tlcm_jax.diffusion.guidance import Denoiser, NullOf, guided
from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.timesteps import check_timesteps
from tlcm_jax.diffusion.trajectories import teacher_path


def sample(
    denoiser: Denoiser,
    process: Process,
    noise: Float[Array, " b *latent"],
    conditioning: PyTree[Array],
    timesteps: Sequence[int],
    keys: Key[Array, " b"] | None = None,
    gamma: float = 1.0,
    noises: Float[Array, "renoisings b *latent"] | None = None,
) -> Float[Array, " b *latent"]:
    """Draws latents with a distilled model: equations (1) and (2), as one `lax.scan`.

    The result is a pure function of its arguments; to jit it, close over `denoiser`, `process`,
    `timesteps` and `gamma`, which are Python values.

    Args:
      denoiser: the student, called once a step on the batch as it is.
      process: of the student.
      noise: unit Gaussian, the latent at `timesteps[0]`.
      conditioning: the denoiser's, leading axis b.
      timesteps: falling training steps, such as `timesteps.student_timesteps(4)`.
      keys: source of each sample's fresh noise, `[b]`, drawn at step i from `fold_in(key, i)`; not
        needed with one step, with `gamma` 0 or with `noises`.
      gamma: in 0 .. 1, the share of fresh noise.
      noises: the fresh noise itself, one less than there are steps, for comparing with another
        implementation on the same noise.

    Returns:
      The last step's x0: latents as the VAE's decoder expects them, times its scaling factor.

    Raises:
      ValueError: times that do not fall or lie outside the schedule, gamma outside 0 .. 1,
        fresh noise needed and neither `keys` nor `noises` given, or too few or many `noises`.
    """
    plan = levels(process, tuple(timesteps), gamma)
    renoisings = len(timesteps) - 1
    noise = noise.astype(jnp.float32)
    if noises is not None:
        if len(noises) != renoisings:
            raise ValueError(f"{len(timesteps)} steps need {renoisings} noises, got {len(noises)}")
        noises = jnp.concatenate([noises, jnp.zeros_like(noise)[None]])
    elif not np.any(plan[:, 2]):
        noises = jnp.zeros((len(timesteps), *(1,) * noise.ndim), noise.dtype)
    elif keys is None:
        raise ValueError("several steps with gamma > 0 draw fresh noise: pass keys or noises")

    def advance(z, xs):
        index, t, level, xi = xs
        if xi is None:
            xi = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, index), z.shape[1:])
        return student_step(denoiser, process, z, t, level, xi, conditioning), None

    xs = (
        jnp.arange(len(timesteps)),
        jnp.asarray([process.time(t) for t in timesteps]),
        jnp.asarray(plan, jnp.float32),
        noises,
    )
    return jax.lax.scan(advance, noise, xs)[0]


def normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, " b *latent"]:
    """Unit Gaussian noise, a key for each sample: `[b, *shape]`."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def student_step(
    denoiser: Denoiser,
    process: Process,
    z: Float[Array, " b *latent"],
    t: Num[Array, ""],
    level: Float[Array, " 3"],
    xi: Float[Array, "#b *#latent"],
    conditioning: PyTree[Array],
) -> Float[Array, " b *latent"]:
    """One step of `sample`, equation (1): from the latents `z` at time `t` to the next level.

    Time and level are arrays, so that all steps can share one compiled function.

    Args:
      denoiser: the student.
      process: of the student.
      z: latents at time `t`.
      t: the process's time, of all of them.
      level: (alpha_s, d, n) of the next level, a row of `levels`.
      xi: fresh unit Gaussian noise.
      conditioning: the denoiser's, leading axis b.
    """
    alpha_s, direct, fresh = level
    t = jnp.full(z.shape[:1], t)
    x0 = denoiser(z, t, conditioning)
    return alpha_s * x0 + direct * process.to_eps(z, x0, t) + fresh * xi


def levels(
    process: Process, timesteps: tuple[int, ...], gamma: float
) -> Float[np.ndarray, "steps 3"]:
    """(alpha_s, d, n) of equations (1) and (2) for each step's next level s.

    Raises:
      ValueError: training steps that do not fall or lie outside the schedule, or gamma outside
        0 .. 1.
    """
    check_timesteps(process, timesteps)
    check_gamma(gamma)
    lowered = tuple(int((1 - gamma) * s) for s in timesteps[1:])
    with jax.ensure_compile_time_eval():  # numbers, also where `sample` is being traced
        times = jnp.asarray([process.time(s) for s in (*timesteps[1:], *lowered)] or [process.end])
        alphas = np.asarray(process.alpha(times), np.float64)
        sigmas = np.asarray(process.sigma(times), np.float64)
    rows, count = [], len(lowered)
    for i, lower in enumerate(lowered):
        alpha_s, sigma_s = alphas[i], sigmas[i]
        if lower == 0 and gamma > 0:
            rows.append((alpha_s, 0.0, sigma_s))
            continue
        direct = sigma_s if gamma == 0 else alpha_s * sigmas[count + i] / alphas[count + i]
        rows.append((alpha_s, direct, np.sqrt(max(0.0, sigma_s**2 - direct**2))))
    return np.asarray([*rows, (1.0, 0.0, 0.0)])


def check_gamma(gamma: float) -> None:
    """Raises a ValueError unless gamma lies in 0 .. 1."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma}: must lie in 0 (deterministic) to 1 (all noise fresh)")


def sample_teacher(
    denoiser: Denoiser,
    process: Process,
    noise: Float[Array, " b *latent"],
    conditioning: PyTree[Array],
    null_of: NullOf,
    steps: int = 25,
    scale: float = 8.0,
    spacing: str = "trailing",
) -> Float[Array, " b *latent"]:
    """Draws latents with the undistilled model: DDIM with classifier-free guidance.

    The last step goes to the cleanest time, as diffusers' `DDIMScheduler` does with
    `set_alpha_to_one` false, which is what Stable Diffusion's configs say.

    Args:
      denoiser: the teacher without guidance.
      process: of the teacher.
      noise: unit Gaussian, the latent at the first time.
      conditioning: the denoiser's, leading axis b.
      null_of: the unconditional conditioning (guidance.py).
      steps: number of guided calls.
      scale: w of classifier-free guidance.
      spacing: as in `Process.grid`.

    Returns:
      Latents at the cleanest time.
    """
    stops = jnp.asarray((*process.grid(steps, spacing), process.end))
    times = jnp.broadcast_to(stops, (noise.shape[0], len(stops)))
    teacher = guided(denoiser, scale, null_of)
    return teacher_path(teacher, process, noise, times, conditioning)[1]
