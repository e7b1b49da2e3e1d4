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

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt8
from PIL import Image

from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.controls import ControlNetwork
from tlcm_jax.families.product import Params
from tlcm_jax.generation.canvas import fit, read_picture
from tlcm_jax.io.image_size import Resolution
from tlcm_jax.training.sharding import place

_CANNY = "canny:"
# OpenCV's thresholds in diffusers' examples.
_LOW, _HIGH = 100, 200
_LARGEST_SCALE = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """A control network at work.

    Attributes:
      network: a ControlNet or a T2I-Adapter, as `LatentModel.load_control` reads it.
      images: uint8 `[n, h, w, c]`, what it is steered by: one for each prompt or one for all, of
        the size that is drawn.
      scale: what its residuals are multiplied by, 0 to 2.
      start: the fraction of the steps from which it steers.
      end: the fraction up to which it does.
    """

    network: ControlNetwork
    images: np.ndarray
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """The controls of a call of n steps, and their weights where the model's are.

    Attributes:
      model: what they steer.
      controls: those.
      steps: n.
      weights: of each.
    """

    model: LatentModel
    controls: Sequence[Control]
    steps: int
    weights: tuple[Params, ...]

    @classmethod
    def of(
        cls,
        model: LatentModel,
        controls: Sequence[Control],
        count: int,
        size: tuple[int, int],
        steps: int,
        mesh: Mesh | None,
    ) -> "Steering":
        """For `count` prompts and images of `size`; errors are those of `Control.check`."""
        for control in controls:
            control.check(count, size, steps)
        weights = tuple(place(control.network.params, mesh) for control in controls)
        return cls(model=model, controls=controls, steps=steps, weights=weights)

    def rows(self, count: int) -> tuple[np.ndarray, ...]:
        """The controls' images, a row for each of `count` prompts."""
        return tuple(
            np.broadcast_to(control.images, (count, *control.images.shape[1:]))
            for control in self.controls
        )

    def told(
        self, conditioning: PyTree[Array], images: Sequence[UInt8[Array, "b h w c"]], step: int
    ) -> PyTree[Array]:
        """A conditioning with a batch's rows, and the scales that hold at a step."""
        if not self.controls:
            return conditioning
        pictures = [jnp.asarray(image, jnp.float32) / 255 for image in images]
        scales = [control.scale_at(step, self.steps) for control in self.controls]
        return self.model.with_controls(conditioning, pictures, scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedControl:
    """A control whose network is not read yet: all that can be wrong before that is found.

    Attributes:
      path: of the network.
      name: of its image's file, for messages.
      image: upright, in RGB.
      edges: take the image's edges.
      scale, start, end: as of `Control`.
    """

    path: str
    name: str
    image: Image.Image
    edges: bool
    scale: float
    start: float
    end: float

    @classmethod
    def read(cls, path: str, text: str, scale: float, start: float, end: float) -> "WantedControl":
        """Reads the image: `FILE`, or `canny:FILE` for its edges.

        Raises:
          FileNotFoundError, ValueError: there is none, it cannot be read, or a setting is out of
            range.
          ModuleNotFoundError: edges need a library that is not installed.
        """
        check_settings(scale, start, end)
        edges, name = text.startswith(_CANNY), text.removeprefix(_CANNY)
        if edges:
            _require_canny()
        return cls(
            path=path, name=name, image=read_picture(Path(name)), edges=edges,
            scale=scale, start=start, end=end,
        )  # fmt: skip


def load_controls(
    model: LatentModel, wanted: Sequence[WantedControl], resolution: Resolution
) -> tuple[tuple[Control, ...], list[str]]:
    """Reads the networks, and fits the images to what is drawn.

    Args:
      model: what they steer; a network named twice is read once.
      wanted: in their order.
      resolution: of the images that are drawn.

    Returns:
      The controls, and a line on each image that says how it was fitted.

    Raises:
      FileNotFoundError, ValueError: as `LatentModel.load_control`.
    """
    networks: dict[str, ControlNetwork] = {}
    controls, lines = [], []
    for each in wanted:
        if each.path not in networks:
            networks[each.path] = model.load_control(each.path)
        network, size = networks[each.path], model.image_size(resolution)
        images, said = fit_control(each.image, size, network.channels, edges=each.edges)
        lines.append(f"{each.name}: {said}" if said else each.name)
        controls.append(
            Control(
                network=network, images=images, scale=each.scale, start=each.start, end=each.end
            )
        )
    return tuple(controls), lines


def fit_control(
    image: Image.Image, size: tuple[int, int], channels: int = 3, *, edges: bool = False
) -> tuple[UInt8[np.ndarray, "1 h w c"], str]:
    """A control image as a network takes it: scaled to cover the size, and cut about its centre.

    Args:
      image: in RGB.
      size: height and width of what is drawn.
      channels: that the network takes, 3 or 1.
      edges: take the picture's edges (Canny), at that size.

    Returns:
      The image, and in words how it was fitted; "" where nothing was done.
    """
    fitted, said = fit(image, size)
    if edges:
        fitted = Image.fromarray(canny(np.asarray(fitted)))
        said = f"{said}, then its edges (canny)" if said else "its edges (canny)"
    pixels = np.asarray(fitted.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(1, *size, channels), said


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
