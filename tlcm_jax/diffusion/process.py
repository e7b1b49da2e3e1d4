"""The noise schedule: how much signal and how much noise a latent holds at time t.

A latent at time t, from data x0 and unit Gaussian noise e, is

    z_t = alpha_t x0 + sigma_t e,                                               (1)
    alpha_t = sqrt(abar_t),   sigma_t = sqrt(1 - abar_t),                        (2)
    abar_t = prod_{i <= t} (1 - beta_i),   t = 0 .. T-1,                         (3)

with the betas of the model's own `scheduler_config.json` (Ho et al. 2020, arXiv 2006.11239; the
"scaled_linear" variant is that of latent diffusion, arXiv 2112.10752). Time 0 is the cleanest
level that the model knows, not clean data: sigma_0 is 0.029 for Stable Diffusion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction")

# What each of diffusers' scheduler classes assumes where its config is silent: beta_start, beta_end
# and beta_schedule. All of them compute abar by equation (3); classes that do not (flows, EDM,
# CogVideoX's shifted abar, unCLIP's cosine) are not in the table.
_LINEAR = (0.0001, 0.02, "linear")
_LATENT = (0.00085, 0.012, "scaled_linear")
_KARRAS = (0.00085, 0.012, "linear")
SCHEDULERS = {
    "DDIMInverseScheduler": _LINEAR,
    "DDIMParallelScheduler": _LINEAR,
    "DDIMScheduler": _LINEAR,
    "DDPMParallelScheduler": _LINEAR,
    "DDPMScheduler": _LINEAR,
    "DEISMultistepScheduler": _LINEAR,
    "DPMSolverMultistepInverseScheduler": _LINEAR,
    "DPMSolverMultistepScheduler": _LINEAR,
    "DPMSolverSDEScheduler": _KARRAS,
    "DPMSolverSinglestepScheduler": _LINEAR,
    "EulerAncestralDiscreteScheduler": _LINEAR,
    "EulerDiscreteScheduler": _LINEAR,
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "LCMScheduler": _LATENT,
    "LMSDiscreteScheduler": _LINEAR,
    "PNDMScheduler": _LINEAR,
    "SASolverScheduler": _LINEAR,
    "TCDScheduler": _LATENT,
    "UniPCMultistepScheduler": _LINEAR,
}

# Settings that change equations (1)-(3), or the x0 that is read from them, in a way that the
# distillation does not follow; with the reason that the error message gives.
_REFUSED_IF_TRUE = {
    "rescale_betas_zero_snr": "at alpha = 0 an eps prediction no longer determines x0",
    "thresholding": "x0 is never clipped here",
    "clip_sample": "x0 is never clipped here",
    "use_flow_sigmas": "the model is a flow, not a diffusion with betas",
}


def broadcast(values: Shaped[Array, " b"]) -> Shaped[Array, "b 1 1 1"]:
    """Shapes one number or truth value a sample so that it meets a batch of latents."""
    return values[:, None, None, None]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Equations (1)-(3) as tables; a constant that jitted functions close over.

    Attributes:
      alphas_cumprod: abar_t of equation (3), float32, `[T]`, falling, inside (0, 1).
      prediction_type: what the raw network returns, "epsilon" or "v_prediction".
    """

    alphas_cumprod: Float[np.ndarray, " T"]
    prediction_type: str = "epsilon"

    def __post_init__(self):
        table = self.alphas_cumprod
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                _unsupported("prediction_type", self.prediction_type, " or ".join(PREDICTION_TYPES))
            )
        if not (np.all(table > 0) and np.all(table < 1) and np.all(np.diff(table) < 0)):
            raise ValueError("alphas_cumprod must fall strictly with time, inside (0, 1)")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads a diffusers `scheduler_config.json` of one of the classes in `SCHEDULERS`.

        Keys that only choose a sampler (spacing, Karras sigmas, solver order) do not matter here
        and are ignored; absent keys take the class's defaults, DDIM's where no class is named.
        `clip_sample`, true by default in some classes, counts as false when absent: diffusers'
        Stable Diffusion pipelines switch it off.

        Args:
          config: the parsed JSON.

        Returns:
          The schedule; abar is accumulated in float64 over float32 betas, as PyTorch does it.

        Raises:
          ValueError: the config asks for something that equations (1)-(3) do not cover. The
            message names key and value and says what is supported.
        """
        for key, reason in _REFUSED_IF_TRUE.items():
            if config.get(key):
                raise ValueError(_unsupported(key, config[key], f"false ({reason})"))
        steps = int(config.get("num_train_timesteps", 1000))
        betas = _betas(config, steps)
        alphas_cumprod = np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)
        return cls(alphas_cumprod, config.get("prediction_type") or "epsilon")

    @property
    def train_steps(self) -> int:
        """T, the number of times the model was trained on; pure noise is at T - 1."""
        return len(self.alphas_cumprod)

    @cached_property
    def alphas(self) -> Float[np.ndarray, " T"]:
        """alpha_t of equation (2), float32."""
        return np.sqrt(self.alphas_cumprod.astype(np.float64)).astype(np.float32)

    @cached_property
    def sigmas(self) -> Float[np.ndarray, " T"]:
        """sigma_t of equation (2), float32."""
        return np.sqrt(1 - self.alphas_cumprod.astype(np.float64)).astype(np.float32)

    def alpha(self, t: Int[Array, " b"]) -> Float[Array, "b 1 1 1"]:
        """alpha_t of each sample's own time, float32."""
        return broadcast(jnp.asarray(self.alphas)[t])

    def sigma(self, t: Int[Array, " b"]) -> Float[Array, "b 1 1 1"]:
        """sigma_t of each sample's own time, float32."""
        return broadcast(jnp.asarray(self.sigmas)[t])

    def diffuse(
        self, x0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Equation (1): data `x0` brought to time `t` by unit Gaussian `noise`."""
        return self.alpha(t) * x0 + self.sigma(t) * noise


def _betas(config: Mapping[str, Any], steps: int) -> Float[np.ndarray, " T"]:
    """The float32 betas that a scheduler config describes."""
    kind = config.get("_class_name", "unknown")
    silent = "beta_schedule" not in config and config.get("trained_betas") is None
    if kind not in SCHEDULERS and ("_class_name" in config or silent):
        lack = "has no beta_schedule and " if silent else ""
        raise ValueError(
            f"scheduler config of class {kind} {lack}is not supported; supported: discrete-time"
            f" diffusion by one of {', '.join(SCHEDULERS)}"
        )
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
        if betas.shape != (steps,) or not np.all((betas > 0) & (betas < 1)):
            raise ValueError(
                _unsupported(
                    "trained_betas",
                    f"array of shape {betas.shape}",
                    f"{steps} numbers (num_train_timesteps) inside (0, 1)",
                )
            )
        return betas
    default_start, default_end, default_curve = SCHEDULERS.get(kind, _LINEAR)
    start = float(config.get("beta_start", default_start))
    end = float(config.get("beta_end", default_end))
    curve = config.get("beta_schedule", default_curve)
    if curve == "linear":
        return _linspace(start, end, steps)
    if curve == "scaled_linear":
        return _linspace(start**0.5, end**0.5, steps) ** 2
    raise ValueError(_unsupported("beta_schedule", curve, " or ".join(BETA_SCHEDULES)))


def _linspace(start: float, end: float, steps: int) -> Float[np.ndarray, " T"]:
    """`torch.linspace` to the last bit, with which diffusers makes the betas.

    It takes a float32 step from both ends, each sum rounded once; numpy's rounds elsewhere.
    """
    low, high = np.float32(start), np.float32(end)
    step = np.float64((high - low) / np.float32(steps - 1))
    index = np.arange(steps)
    rising, falling = low + step * index, high - step * (steps - 1 - index)
    return np.where(index < steps // 2, rising, falling).astype(np.float32)


def _unsupported(key: str, value: Any, supported: str) -> str:
    return f"scheduler config {key} = {value!r} is not supported; supported: {supported}"
