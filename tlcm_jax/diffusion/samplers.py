"""Few-step samplers, each as one plan: the times of its calls, and where each step goes.

All of them step by sampling.py's equation (1), z_s = alpha_s x0 + d eps + n xi, and differ in their
times and in (d, n). With sigma' = sigma / alpha, and s the next time:

| sampler | d | n | after the last call |
|---|---|---|---|
| consistency | sampling.py, equation (2) | the same | x0 |
| lcm | 0 | sigma_s | x0 |
| tcd | alpha_s sigma'_u, u = floor((1 - eta) s) | sqrt(1 - d^2 - alpha_s^2) | level 0 |
| ddim | sigma_s | 0 | level 0 |
| euler | sigma_s | 0 | x0 |
| euler_ancestral | alpha_s sqrt(sigma'_s^2 - n'^2) | alpha_s n' | x0 |

where n'^2 = sigma'_s^2 (sigma'_t^2 - sigma'_s^2) / sigma'_t^2. Level 0 is the model's cleanest: the
step alpha_0 x0 + sigma_0 eps. On a variance-preserving process Euler's step in x / alpha is DDIM's;
Euler's schedulers begin from noise of deviation sigma_T and not 1. The times of all but the first
are those of diffusers' schedulers of these names ("trailing" for the last three), which the tests
hold them against.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tlcm_jax.diffusion import sampling
from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.timesteps import check_timesteps, student_timesteps

# Steps of the teacher whose times LCM and TCD were distilled on; theirs are every so many of them.
_ORIGINAL_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """A plan of n calls.

    Attributes:
      timesteps: of the calls, falling training steps.
      levels: (alpha_s, d, n) of each step.
      first: deviation of the noise that sampling begins from.
    """

    timesteps: tuple[int, ...]
    levels: Float[np.ndarray, "n 3"]
    first: float = 1.0

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.timesteps)


def consistency(
    process: Process, steps: int, gamma: float = 1.0, timesteps: Sequence[int] | None = None
) -> Sampler:
    """The distilled models' own: TLCM's times unless others are given, a share of fresh noise.

    Raises:
      ValueError: steps outside 1 .. 8, times that do not fall, or gamma outside 0 .. 1.
    """
    times = tuple(timesteps or student_timesteps(steps))
    return Sampler(timesteps=times, levels=sampling.levels(process, times, gamma))


def lcm(process: Process, steps: int, timesteps: Sequence[int] | None = None) -> Sampler:
    """LCM's: every x0 noised again (Luo et al. 2023, arXiv 2310.04378)."""
    return consistency(process, steps, 1.0, timesteps or _skipped(process, steps))


def tcd(process: Process, steps: int, eta: float = 0.3) -> Sampler:
    """TCD's strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159).

    Args:
      process: of the model.
      steps: 1 to 50.
      eta: in 0 .. 1, how far below the next time each step goes before noise is added again.

    Raises:
      ValueError: steps or eta out of range.
    """
    sampling.check_gamma(eta)
    times = _skipped(process, steps)
    following = (*times[1:], 0)
    alpha, sigma = _levels_of(process, following)
    alpha_u, sigma_u = _levels_of(process, [int((1 - eta) * s) for s in following])
    direct = alpha * sigma_u / alpha_u
    fresh = np.sqrt(np.maximum(0, sigma**2 - direct**2))
    return Sampler(timesteps=times, levels=np.stack([alpha, direct, fresh], axis=1))


def ddim(process: Process, steps: int) -> Sampler:
    """DDIM with trailing times (Song et al. 2020, arXiv 2010.02502; Lin et al., 2305.08891)."""
    times = _trailing(process, steps)
    alpha, sigma = _levels_of(process, (*times[1:], 0))
    return Sampler(timesteps=times, levels=np.stack([alpha, sigma, 0 * sigma], axis=1))


def euler(process: Process, steps: int, *, ancestral: bool = False) -> Sampler:
    """Euler's, and the ancestral one, with trailing times (Karras et al. 2022, arXiv 2206.00364).

    Raises:
      ValueError: steps out of range, or a schedule that ends in pure noise, where its first sigma'
        is infinite.
    """
    times = _trailing(process, steps)
    alpha, sigma = _levels_of(process, times)
    if not np.all(alpha > 0):
        raise ValueError("Euler's sampler needs a schedule that does not end in pure noise: ddim")
    now, after = (sigma / alpha)[:-1], (sigma / alpha)[1:]
    fresh = np.sqrt(after**2 * (now**2 - after**2) / now**2) if ancestral else 0 * after
    direct = np.sqrt(after**2 - fresh**2)
    rows = np.stack([np.ones_like(now), direct, fresh], axis=1) * alpha[1:, None]
    last = np.array([[1.0, 0.0, 0.0]])
    levels = np.concatenate([rows, last])
    return Sampler(timesteps=times, levels=levels, first=float(sigma[0]))


def euler_ancestral(process: Process, steps: int) -> Sampler:
    """See `euler`."""
    return euler(process, steps, ancestral=True)


# By name, from a process and a number of steps.
SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    "consistency": consistency,
    "lcm": lcm,
    "tcd": tcd,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
}


def _skipped(process: Process, steps: int) -> tuple[int, ...]:
    """The training steps of LCM's and TCD's schedulers."""
    if not 1 <= steps <= _ORIGINAL_STEPS:
        raise ValueError(f"steps = {steps}: this sampler takes 1 to {_ORIGINAL_STEPS}")
    skip = process.num_train_timesteps // _ORIGINAL_STEPS
    original = np.arange(_ORIGINAL_STEPS, 0, -1) * skip - 1
    return tuple(int(original[_ORIGINAL_STEPS * i // steps]) for i in range(steps))


def _trailing(process: Process, steps: int) -> tuple[int, ...]:
    """The training steps of trailing spacing."""
    total = process.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps = {steps}: this sampler takes 1 to {total}")
    times = np.round(np.arange(total, 0, -total / steps))[:steps].astype(int) - 1
    check_timesteps(process, found := tuple(int(t) for t in times))
    return found


def _levels_of(process: Process, timesteps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The alphas and sigmas of training steps, float64."""
    with jax.ensure_compile_time_eval():
        times = jnp.asarray([process.time(t) for t in timesteps])
        return (
            np.asarray(process.alpha(times), np.float64),
            np.asarray(process.sigma(times), np.float64),
        )
