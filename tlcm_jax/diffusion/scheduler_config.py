"""Reads a model's `scheduler_config.json` as a `Process`, and writes a student's.

A diffusion's abar is accumulated from the betas of its training (Ho et al. 2020, arXiv 2006.11239;
"scaled_linear" is latent diffusion's, arXiv 2112.10752),

    abar_t = prod_{i <= t} (1 - beta_i),   t = 0 .. T-1,                         (1)

and with `rescale_betas_zero_snr` shifted and scaled so that its root ends at 0 (Lin et al. 2023,
arXiv 2305.08891, algorithm 1),

    sqrt(abar_t) <- (sqrt(abar_t) - sqrt(abar_T-1)) sqrt(abar_0) / (sqrt(abar_0) - sqrt(abar_T-1)).
                                                                                 (2)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from tlcm_jax.diffusion.process import PREDICTION_TYPES, DiscreteVP, Process, RectifiedFlow

BETA_SCHEDULES = ("linear", "scaled_linear")

# What each of diffusers' scheduler classes assumes where its config is silent: beta_start, beta_end
# and beta_schedule. All of them compute abar by equation (1); classes that do not (flows, EDM,
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

# A straight flow; its betas do not exist.
FLOWS = ("FlowMatchEulerDiscreteScheduler",)

# Settings that change abar, or the x0 that is read from a prediction, in a way that the
# distillation does not follow; with the reason that the error message gives.
_REFUSED_IF_TRUE = {
    "thresholding": "x0 is never clipped here",
    "use_flow_sigmas": "the model is a flow, not a diffusion with betas",
    "use_dynamic_shifting": "the shift must not depend on the resolution",
}


def process_from_config(config: Mapping[str, Any]) -> Process:
    """Reads a diffusers `scheduler_config.json` of one of the classes in `SCHEDULERS` or `FLOWS`.

    Keys that only choose a sampler (spacing, Karras sigmas, solver order) do not matter here and
    are ignored; keys that are absent or null take the class's defaults, DDIM's where no class is
    named. `clip_sample`, true by default in some classes, counts as false: diffusers' Stable
    Diffusion pipelines switch it off, with a warning where the config asks for it.

    Args:
      config: the parsed JSON.

    Returns:
      The process; abar is accumulated in float64 over float32 betas, as PyTorch does it.

    Raises:
      ValueError: the config asks for something that equations (1) and (2) do not cover. The
        message names key and value and says what is supported.
    """
    for key in (*_REFUSED_IF_TRUE, "clip_sample", "rescale_betas_zero_snr"):
        if not isinstance(config.get(key), bool | None):
            raise ValueError(_unsupported(key, config[key], "true or false"))
    for key, reason in _REFUSED_IF_TRUE.items():
        if config.get(key):
            raise ValueError(_unsupported(key, config[key], f"false ({reason})"))
    if config.get("clip_sample"):
        logging.warning(
            "scheduler config clip_sample = true is switched off: latents are not clipped"
        )
    if config.get("_class_name") in FLOWS:
        shift, steps = config.get("shift"), config.get("num_train_timesteps")
        return RectifiedFlow(
            1.0 if shift is None else float(shift), 1000 if steps is None else int(steps)
        )
    noise = _noise(config)
    if noise.prediction_type not in PREDICTION_TYPES:
        supported = " or ".join(PREDICTION_TYPES)
        raise ValueError(_unsupported("prediction_type", noise.prediction_type, supported))
    betas = _betas(config, noise)
    if noise.rescale_betas_zero_snr:
        if noise.prediction_type == "epsilon":
            reason = "at alpha = 0 an eps prediction does not determine x0; v_prediction does"
            raise ValueError(_unsupported("rescale_betas_zero_snr", True, f"false ({reason})"))
        betas = _zero_terminal_snr(betas)
    return DiscreteVP(_cumulated(betas), noise.prediction_type)


def lcm_scheduler(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The `LCMScheduler` config of a student, given its teacher's scheduler config.

    With it, diffusers' `LCMScheduler` given the student's timesteps is the sampler of
    `sampling.sample` with gamma 1; the scheduler's own grid at 1, 2, 4 and 8 steps lies on the
    same eight milestones. Its levels are the teacher's: what the teacher's config leaves to its
    class is written out.

    Args:
      teacher: a `scheduler_config.json` of a class with betas.
    """
    return {
        "_class_name": "LCMScheduler",
        **dataclasses.asdict(_noise(teacher)),
        "original_inference_steps": 8,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noise:
    """What a scheduler's config says of its noise levels, silence filled in from `SCHEDULERS`.

    The one reading that training and export share; the names are diffusers' own.
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: Sequence[float] | None
    prediction_type: str
    rescale_betas_zero_snr: bool


def _noise(config: Mapping[str, Any]) -> _Noise:
    given = {key: value for key, value in config.items() if value is not None}
    start, end, curve = SCHEDULERS.get(str(given.get("_class_name")), _LINEAR)
    return _Noise(
        num_train_timesteps=int(given.get("num_train_timesteps", 1000)),
        beta_start=float(given.get("beta_start", start)),
        beta_end=float(given.get("beta_end", end)),
        beta_schedule=given.get("beta_schedule", curve),
        trained_betas=given.get("trained_betas"),
        prediction_type=given.get("prediction_type", "epsilon"),
        rescale_betas_zero_snr=given.get("rescale_betas_zero_snr", False),
    )


def _cumulated(betas: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Equation (1)."""
    return np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Betas whose abar is that of equation (2).

    By way of float32 betas and in diffusers' order, whose rounding (1e-6) is part of the levels
    that such models were trained on.
    """
    root = np.sqrt(_cumulated(betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = np.square(root)
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def _betas(config: Mapping[str, Any], noise: _Noise) -> Float[np.ndarray, " T"]:
    """The float32 betas that a scheduler config describes."""
    kind, steps = config.get("_class_name"), noise.num_train_timesteps
    silent = config.get("beta_schedule") is None and noise.trained_betas is None
    if kind not in SCHEDULERS and (kind is not None or silent):
        lack = "has no beta_schedule and " if silent else ""
        raise ValueError(
            f"scheduler config of class {kind or 'unknown'} {lack}is not supported; supported: "
            f"discrete-time diffusion by one of {', '.join(SCHEDULERS)}"
        )
    if noise.trained_betas is not None:
        betas = np.asarray(noise.trained_betas, np.float32)
        if betas.shape != (steps,) or not np.all((betas > 0) & (betas < 1)):
            raise ValueError(
                _unsupported(
                    "trained_betas",
                    f"array of shape {betas.shape}",
                    f"{steps} numbers (num_train_timesteps) inside (0, 1)",
                )
            )
        return betas
    start, end, curve = noise.beta_start, noise.beta_end, noise.beta_schedule
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
