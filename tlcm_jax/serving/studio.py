"""What the page can ask for: a request, checked, to a picture."""

import base64
import binascii
import dataclasses
import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tlcm_jax.diffusion.editing import describe_edit, edit_timesteps
from tlcm_jax.diffusion.timesteps import STUDENT_TIMESTEPS
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.canvas import fit_canvas, read_pictures
from tlcm_jax.generation.editing import edit
from tlcm_jax.generation.generate import (
    GenerationOptions,
    generate,
    generate_teacher,
    merged,
)
from tlcm_jax.io.image_size import Resolution

TEACHER_STEPS = 25
_LONGEST = 2000  # characters of a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a page sends; its picture and mask as base64 of their files.

    Attributes:
      prompt: what to show.
      steps: of the student.
      seed: of the noise, the same for student and teacher.
      teacher: drawn by the undistilled model.
      strength: with a picture: how far it changes.
      picture: to draw on.
      mask: white where it is drawn anew.
    """

    prompt: str
    steps: int = 2
    seed: int = 0
    teacher: bool = False
    strength: float = 0.5
    picture: str | None = None
    mask: str | None = None

    @classmethod
    def read(cls, given: Any) -> "Request":
        """A request from parsed JSON.

        Raises:
          ValueError: an unknown, missing or ill-typed field, or a value out of range.
        """
        if not isinstance(given, Mapping):
            raise ValueError("a request is an object with a prompt")
        kinds: dict[str, Any] = {
            "prompt": str, "steps": int, "seed": int, "teacher": bool, "strength": (int, float),
            "picture": (str, type(None)), "mask": (str, type(None)),
        }  # fmt: skip
        for name, value in given.items():
            if name not in kinds:
                raise ValueError(f"unknown field {name!r}; known: {', '.join(kinds)}")
            wrong_bool = isinstance(value, bool) and kinds[name] is not bool
            if wrong_bool or not isinstance(value, kinds[name]):
                raise ValueError(f"{name} = {value!r}: of the wrong type")
        if "prompt" not in given:
            raise ValueError("the prompt is missing")
        found = cls(**given)
        if len(found.prompt) > _LONGEST:
            raise ValueError(f"the prompt has {len(found.prompt)} characters, over {_LONGEST}")
        if not 0 <= found.seed < 2**32:
            raise ValueError(f"seed = {found.seed}: must lie in 0 to {2**32 - 1}")
        if found.mask is not None and found.picture is None:
            raise ValueError("a mask goes with a picture")
        if found.teacher and found.picture is not None:
            raise ValueError("the teacher draws from the prompt alone; take the picture away")
        return found


class Studio:
    """A student, its teacher, and one picture drawn at a time."""

    def __init__(
        self,
        model: LatentModel,
        adapter: Mapping[str, Any] | None,
        *,
        tables: Mapping[int, Sequence[int]] = STUDENT_TIMESTEPS,
        gamma: float = 1.0,
        student_scale: float = 1.0,
        teacher: LatentModel | None = None,
        teacher_scale: float = 8.0,
        resolution: Resolution = None,
    ):
        """Merges the adapter.

        Args:
          model: the student, or what its adapter belongs to.
          adapter: scaled; None where the model is the student itself.
          tables: the student's times by its number of steps.
          gamma: its share of fresh noise.
          student_scale: of its guidance, 1 for none.
          teacher: what is drawn beside it; None for nothing.
          teacher_scale: of its guidance.
          resolution: of the images.
        """
        if adapter is not None:
            weights = merged(model.params[model.backbone], adapter)
            model = model.with_params(**{model.backbone: weights})
        self.model, self.tables, self.teacher = model, tables, teacher
        self._gamma, self._scales = gamma, (student_scale, teacher_scale)
        self._options = GenerationOptions(resolution=resolution, batch_size=1)
        self._lock = threading.Lock()

    @property
    def most_steps(self) -> int:
        """Of the student."""
        return max(self.tables)

    def draw(self, request: Request) -> tuple[bytes, str]:
        """A PNG, and in words how it was made.

        Raises:
          ValueError: what the model cannot draw.
        """
        with self._lock:
            images, said = self._draw(request)
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(images[0])).save(file, format="PNG")
        return file.getvalue(), said

    def _draw(self, request: Request) -> tuple[UInt8[np.ndarray, "1 h w 3"], str]:
        prompts, options = [request.prompt], self._options
        student_scale, teacher_scale = self._scales
        if request.teacher:
            if self.teacher is None:
                raise ValueError("there is no teacher to draw beside this model")
            images = generate_teacher(
                self.teacher, prompts, TEACHER_STEPS, teacher_scale, request.seed, options
            )
            return images, f"teacher, {TEACHER_STEPS} steps, guidance {teacher_scale:g}"
        if request.steps not in self.tables:
            raise ValueError(f"steps = {request.steps}: give 1 to {self.most_steps}")
        if request.picture is None:
            times = self.tables[request.steps]
            images = generate(
                self.model, prompts, request.steps, request.seed, None, self._gamma, options,
                times, student_scale,
            )  # fmt: skip
            return images, f"{request.steps} step{'s' * (request.steps > 1)}"
        times = edit_timesteps(request.steps, request.strength, self.tables)
        mask = None if request.mask is None else _file(request.mask, "mask")
        pictures = read_pictures(_file(request.picture, "picture"), mask)
        canvas, fitted = fit_canvas(*pictures, self.model.image_size(options.resolution))
        images = edit(
            self.model, prompts, canvas, request.steps, request.strength, request.seed, None,
            self._gamma, options, self.tables, student_scale,
        )  # fmt: skip
        said = describe_edit(times, request.strength)
        return images, f"{said}; {fitted}" if fitted else said


class _Named(io.BytesIO):
    """A file in memory whose messages name it."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return f"the {self._name}"


def _file(text: str, name: str) -> _Named:
    try:
        return _Named(base64.b64decode(text, validate=True), name)
    except (binascii.Error, ValueError):
        raise ValueError(f"the {name} is no base64") from None
