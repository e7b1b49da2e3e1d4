"""How data becomes noise: one interface for diffusion and for flows, on latents of any rank.

A latent at time t, from data x0 and unit Gaussian noise e, is

    z_t = alpha_t x0 + sigma_t e.                                                (1)

The canonical prediction everywhere outside this file is x0, which is finite at both ends of time;
a network's own prediction is converted once, by `to_x0`. One table, with z = alpha x0 + sigma e:

    prediction      x0 =                           e = (z - alpha x0) / sigma    (2)
    epsilon         (z - sigma eps) / alpha
    v_prediction    alpha z - sigma v              (Salimans & Ho 2022, arXiv 2202.00512)
    sample          the prediction itself
    velocity        z - t v,  v = e - x0           (flows: alpha = 1 - t, sigma = t)

The deterministic step holds the e of (2) fixed from t to s. It is DDIM (Song et al. 2020, arXiv
2010.02502) on a diffusion and Euler's step on a straight flow:

    step(z, x0, t -> s) = r z + k x0,   r = sigma_s / sigma_t,   k = alpha_s - r alpha_t,    (3)

and, given both ends, is solved for the x0 that joins them (multistep consistency models, Heek et
al. 2024, arXiv 2403.06807),

    x0 = (z_s - r z_t) / k,   t != s.                                            (4)

The form r z + k x0 gives r = 1 and k = 0 exactly at t = s: a path that has arrived stays where it
is to the last bit, without a mask.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def bcast_right(values: Shaped[Array, " b"], like: Shaped[Array, " b *latent"]) -> Array:
    """One number or truth value a sample, shaped to meet a batch of latents: `[b, 1, ...]`."""
    return values.reshape(values.shape[0], *(1,) * (like.ndim - 1))


class Process:
    """Equations (1) to (4); a constant that jitted functions close over.

    Subclasses give `alpha`, `sigma`, `to_x0`, `from_x0`, `time`, and these constants.

    Attributes:
      num_train_timesteps: T. Settings count time in training steps, 0 .. T-1, whatever the type
        of the process's own times.
      discrete: whether times are int32 (indices of a table) or float32.
    """

    num_train_timesteps: int
    discrete: ClassVar[bool]

    def alpha(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """alpha_t of equation (1), float32."""
        raise NotImplementedError

    def sigma(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """sigma_t of equation (1), float32."""
        raise NotImplementedError

    def to_x0(
        self, prediction: Float[Array, " b *latent"], z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """The x0 that a network's raw prediction stands for, float32: table (2)."""
        raise NotImplementedError

    def from_x0(
        self, x0: Float[Array, " b *latent"], z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """The raw prediction that stands for an x0, float32: table (2), solved for it.

        What a network is trained towards; at sigma = 0 only an x0 prediction has one.
        """
        raise NotImplementedError

    def time(self, train_step: int) -> int | float:
        """The time of a training step, 0 .. T-1: itself on a table, mapped to 0 .. 1 on a flow."""
        raise NotImplementedError

    def earlier(self, t: Num[Array, " b"], train_steps: int | Int[Array, " b"]) -> Num[Array, " b"]:
        """The time a number of training steps before `t`, after it where negative.

        None lies outside `end` .. `start`.
        """
        raise NotImplementedError

    @property
    def time_dtype(self) -> np.dtype:
        """Of arrays of times."""
        return np.dtype(np.int32 if self.discrete else np.float32)

    @property
    def start(self) -> int | float:
        """The noisiest time, where sampling begins."""
        return self.time(self.num_train_timesteps - 1)

    @property
    def end(self) -> int | float:
        """The cleanest time that the model knows."""
        return self.time(0)

    def grid(self, steps: int, spacing: str = "trailing") -> tuple[int | float, ...]:
        """The times of a sampler of many steps (Lin et al. 2023, arXiv 2305.08891, table 2).

        Args:
          steps: number of steps, 1 .. T-1.
          spacing: "trailing", which begins at T - 1, where pure noise is; or "leading" with
            `steps_offset` 1, Stable Diffusion's default, which ends at 1. Where `steps` does not
            divide T, diffusers' `DDIMScheduler` steps to a time one off the one it calls next
            with "trailing"; here every step ends where the next begins.

        Raises:
          ValueError: another spacing or number of steps.
        """
        total = self.num_train_timesteps
        if not 1 <= steps < total:
            raise ValueError(f"steps = {steps}: the teacher samples in 1 to {total - 1} steps")
        if spacing == "trailing":
            indices = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
        elif spacing == "leading":
            indices = np.arange(steps)[::-1] * (total // steps) + 1
        else:
            raise ValueError(f"spacing = {spacing!r}: supported are 'trailing' and 'leading'")
        return tuple(self.time(int(index)) for index in indices)

    def add_noise(
        self, x0: Float[Array, " b *latent"], noise: Float[Array, " b *latent"], t: Num[Array, " b"]
    ) -> Float[Array, " b *latent"]:
        """Equation (1): data `x0` brought to time `t` by unit Gaussian `noise`."""
        return bcast_right(self.alpha(t), x0) * x0 + bcast_right(self.sigma(t), x0) * noise

    def to_eps(
        self, z: Float[Array, " b *latent"], x0: Float[Array, " b *latent"], t: Num[Array, " b"]
    ) -> Float[Array, " b *latent"]:
        """Equation (2): the noise in `z` if its data is `x0`; 0 where there is no noise."""
        sigma = bcast_right(self.sigma(t), z)
        noise = (z - bcast_right(self.alpha(t), z) * x0) / jnp.where(sigma > 0, sigma, 1.0)
        return jnp.where(sigma > 0, noise, 0.0)

    def coefficients(
        self, t: Num[Array, " b"], s: Num[Array, " b"]
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """The r and k of equation (3), float32."""
        sigma = self.sigma(t)
        r = jnp.where(t == s, 1.0, self.sigma(s) / jnp.where(sigma > 0, sigma, 1.0))
        return r, self.alpha(s) - r * self.alpha(t)

    def step(
        self, z: Float[Array, " b *latent"], x0: Float[Array, " b *latent"],
        t: Num[Array, " b"], s: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """Equation (3): the latent at time `s`, from the latent `z` at time `t` and its `x0`."""
        r, k = self.coefficients(t, s)
        return bcast_right(r, z) * z + bcast_right(k, z) * x0

    def inverse_step(
        self, z: Float[Array, " b *latent"], z_s: Float[Array, " b *latent"],
        t: Num[Array, " b"], s: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """Equation (4): the x0 with which `step` takes `z` at time `t` to `z_s` at `s != t`."""
        r, k = self.coefficients(t, s)
        return (z_s - bcast_right(r, z) * z) / bcast_right(k, z)

    def snr(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """(alpha_t / sigma_t)^2."""
        return jnp.square(self.alpha(t) / self.sigma(t))


@dataclass(frozen=True, eq=False)
class DiscreteVP(Process):
    """Variance-preserving diffusion on a table of T integer times (Ho et al. 2020, 2006.11239).

    alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), t = 0 .. T-1. Time 0 is the cleanest level
    that the model knows, not clean data: sigma_0 is 0.029 for Stable Diffusion.

    Attributes:
      alphas_cumprod: abar_t, float32, `[T]`, falling, inside (0, 1); the last may be 0 (zero
        terminal SNR, Lin et al. 2023, arXiv 2305.08891) unless the network predicts eps.
      prediction_type: what the raw network returns, one of `PREDICTION_TYPES`.
    """

    alphas_cumprod: Float[np.ndarray, " T"]
    prediction_type: str = "epsilon"
    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type = {self.prediction_type!r} is not supported; supported: "
                f"{' or '.join(PREDICTION_TYPES)}"
            )
        if not (np.all(table >= 0) and np.all(table < 1) and np.all(np.diff(table) < 0)):
            raise ValueError("alphas_cumprod must fall strictly with time, inside (0, 1)")
        if table[-1] == 0 and self.prediction_type == "epsilon":
            raise ValueError(
                "alphas_cumprod ends at 0 (rescale_betas_zero_snr), where an eps prediction does "
                "not determine x0: prediction_type must be 'v_prediction'"
            )

    @property
    def num_train_timesteps(self) -> int:  # type: ignore[override]
        """T, the number of times the model was trained on; pure noise is at T - 1."""
        return len(self.alphas_cumprod)

    @cached_property
    def alphas(self) -> Float[np.ndarray, " T"]:
        """alpha_t, float32."""
        return np.sqrt(self.alphas_cumprod.astype(np.float64)).astype(np.float32)

    @cached_property
    def sigmas(self) -> Float[np.ndarray, " T"]:
        """sigma_t, float32."""
        return np.sqrt(1 - self.alphas_cumprod.astype(np.float64)).astype(np.float32)

    def alpha(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """See `Process`."""
        return jnp.asarray(self.alphas)[t]

    def sigma(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """See `Process`."""
        return jnp.asarray(self.sigmas)[t]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DiscreteVP)
            and self.prediction_type == other.prediction_type
            and np.array_equal(self.alphas_cumprod, other.alphas_cumprod)
        )

    def __hash__(self) -> int:
        return hash((self.prediction_type, self.alphas_cumprod.tobytes()))

    def time(self, train_step: int) -> int:
        """See `Process`: the index itself."""
        return train_step

    def earlier(self, t: Num[Array, " b"], train_steps: int | Int[Array, " b"]) -> Num[Array, " b"]:
        """See `Process`."""
        return jnp.clip(t - train_steps, 0, self.num_train_timesteps - 1)

    def to_x0(
        self, prediction: Float[Array, " b *latent"], z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """See `Process`."""
        prediction = prediction.astype(jnp.float32)
        if self.prediction_type == "sample":
            return prediction
        alpha, sigma = bcast_right(self.alpha(t), z), bcast_right(self.sigma(t), z)
        if self.prediction_type == "v_prediction":
            return alpha * z - sigma * prediction
        return (z - sigma * prediction) / alpha

    def from_x0(
        self, x0: Float[Array, " b *latent"], z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """See `Process`."""
        x0 = x0.astype(jnp.float32)
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = bcast_right(self.alpha(t), z), bcast_right(self.sigma(t), z)
        if self.prediction_type == "v_prediction":
            return (alpha * z - x0) / sigma
        return (z - alpha * x0) / sigma


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """A straight flow between data and noise (Liu et al. 2022, arXiv 2209.03003), float times.

    alpha_t = 1 - t, sigma_t = t, t in [0, 1]; the network predicts the velocity e - x0. Training
    steps map to times by the shift of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206,
    equation 23), with u = step / (T - 1):

        t = shift u / (1 + (shift - 1) u).                                       (5)

    Attributes:
      shift: above 1 for resolutions that need more noise.
      num_train_timesteps: T, in which settings count time.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    discrete: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps = {self.num_train_timesteps}: must be over 1")
        if not self.shift > 0:
            raise ValueError(f"shift = {self.shift}: must be greater than 0")

    def alpha(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """See `Process`."""
        return 1 - t.astype(jnp.float32)

    def sigma(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """See `Process`."""
        return t.astype(jnp.float32)

    def time(self, train_step: int) -> int | float:
        """See `Process`: equation (5)."""
        u = train_step / (self.num_train_timesteps - 1)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def earlier(self, t: Num[Array, " b"], train_steps: int | Int[Array, " b"]) -> Num[Array, " b"]:
        """See `Process`: equation (5), solved for u."""
        u = t / (self.shift - (self.shift - 1) * t) - train_steps / (self.num_train_timesteps - 1)
        u = jnp.clip(u, 0.0, 1.0)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def to_x0(
        self, prediction: Float[Array, " b *latent"], z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """See `Process`."""
        return z - bcast_right(self.sigma(t), z) * prediction.astype(jnp.float32)

    def from_x0(
        self, x0: Float[Array, " b *latent"], z: Float[Array, " b *latent"],
        t: Num[Array, " b"],
    ) -> Float[Array, " b *latent"]:  # fmt: skip
        """See `Process`."""
        return (z - x0.astype(jnp.float32)) / bcast_right(self.sigma(t), z)
