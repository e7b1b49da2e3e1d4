"""Pictures that steer: what a control network is given, how strongly, and at which steps.

Of n steps, step i is steered by a control from `start` to `end` where

    start <= i / n    and    (i + 1) / n <= end,                                 (1)

as diffusers' ControlNet pipelines have it (`control_guidance_start`, `control_guidance_end`); with
`start` 0 that is a T2I-Adapter's `adapter_conditioning_factor`. At the others its residuals are
multiplied by 0.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tlcm_jax.families.controls import ControlNetwork
from tlcm_jax.generation.canvas import fit, read_picture

_CANNY = "canny:"
# OpenCV's thresholds in diffusers' examples.
_LOW, _HIGH = 100, 200
_LARGEST_SCALE = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """A control network at work.

    Attributes:
      network: a ControlNet or a T2I-Adapter, as `LatentModel.load_control` reads it.
      images: what it is steered by, one for each prompt or one for all, of the size that is drawn.
      scale: what its residuals are multiplied by, 0 to 2.
      start: the fraction of the steps from which it steers.
      end: the fraction up to which it does.
    """

    network: ControlNetwork
    images: UInt8[np.ndarray, "n h w c"]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check_settings(self.scale, self.start, self.end)
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                f"control images of {self.images.dtype} {self.images.shape}: give uint8 "
                "[n, height, width, channels]"
            )

    def scale_at(self, step: int, steps: int) -> float:
        """What holds at a step, by equation (1)."""
        on = self.start <= step / steps and (step + 1) / steps <= self.end
        return self.scale if on else 0.0

    def check(self, count: int, size: tuple[int, int], steps: int) -> None:
        """Refuses what does not fit the prompts, the pictures or the steps.

        Args:
          count: of the prompts.
          size: height and width of what is drawn.
          steps: of the sampler.

        Raises:
          ValueError: it does not.
        """
        channels = self.network.channels
        if self.images.shape[1:] != (*size, channels):
            raise ValueError(
                f"a control image of shape {self.images.shape[1:]} for {(*size, channels)}: fit it "
                "first (generation.control.fit_control)"
            )
        if len(self.images) not in (1, count):
            raise ValueError(f"{len(self.images)} control images for {count} prompts: give 1 each")
        if not any(self.start <= i / steps and (i + 1) / steps <= self.end for i in range(steps)):
            raise ValueError(
                f"a control from {self.start:g} to {self.end:g} steers none of {steps} steps, each "
                f"of which is 1/{steps}: widen it, or take more steps"
            )


def check_settings(scale: float, start: float, end: float) -> None:
    """Raises a ValueError for a scale or fractions out of range."""
    if not 0 <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"control scale {scale:g}: must lie in 0 to {_LARGEST_SCALE:g}; 1 is what the network "
            "was trained with"
        )
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"a control from {start:g} to {end:g}: give fractions of the steps, the first below "
            "the second, both in 0 to 1"
        )


def check_controls(
    controls: Sequence[Control], count: int, size: tuple[int, int], steps: int
) -> None:
    """`Control.check` of several."""
    for control in controls:
        control.check(count, size, steps)


def control_rows(controls: Sequence[Control], count: int) -> tuple[np.ndarray, ...]:
    """The controls' images, a row for each of `count` prompts."""
    return tuple(
        np.broadcast_to(control.images, (count, *control.images.shape[1:])) for control in controls
    )


def read_control(text: str) -> Image.Image:
    """A control image's file, upright, in RGB.

    Args:
      text: `FILE`, or `canny:FILE` for a picture whose edges are taken later.

    Raises:
      FileNotFoundError, ValueError: there is none, or it cannot be read.
      ModuleNotFoundError: edges need a library that is not installed.
    """
    if text.startswith(_CANNY):
        _require_canny()
    return read_picture(Path(text.removeprefix(_CANNY)))


def fit_control(
    image: Image.Image, network: ControlNetwork, size: tuple[int, int], *, edges: bool = False
) -> tuple[UInt8[np.ndarray, "1 h w c"], str]:
    """A control image as a network takes it: scaled to cover the size, and cut about its centre.

    Args:
      image: as `read_control` gives it.
      network: for its number of channels.
      size: height and width of what is drawn.
      edges: take the picture's edges (Canny), at that size.

    Returns:
      The image, and in words how it was fitted; "" where nothing was done.
    """
    fitted, said = fit(image, size)
    if edges:
        fitted = Image.fromarray(canny(np.asarray(fitted)))
        said = f"{said}, then its edges (canny)" if said else "its edges (canny)"
    pixels = np.asarray(fitted.convert("L" if network.channels == 1 else "RGB"))
    return pixels.reshape(1, *size, network.channels), said


def wants_edges(text: str) -> bool:
    """Whether `canny:FILE` was written."""
    return text.startswith(_CANNY)


def canny(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """Edges, white on black: OpenCV's, by the thresholds of diffusers' examples."""
    return _require_canny().Canny(np.ascontiguousarray(image), _LOW, _HIGH)


def _require_canny() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ModuleNotFoundError(
            f"canny: edges are taken by OpenCV, which does not import ({error}): "
            "pip install 'tlcm_jax[control]', or give a picture of the edges"
        ) from None
    return cv2
