"""Whether a student's images part from its teacher's while it learns: blur, gaudiness, collapse.

Of the same prompts, by the student in few steps and by the teacher in 25 with guidance, two images
of each prompt:

    saturation = mean over pixels of max_c x_c - min_c x_c                              (1)
    detail     = mean of (x - mean of its 3 x 3 neighbours)^2, the energy of high frequencies   (2)
    diversity  = mean over prompts of the root mean square of x_1 - x_2                 (3)

and the scores that the run's scorers give to single images. These are the plain forms of what users
of such trainers report most; they say that images differ from the teacher's, not that they are bad.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from tlcm_jax.evaluation.reporting.contents import Curve
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.io.files import atomic_write
from tlcm_jax.io.json_files import as_object, parse_json

HEALTH_FILE = "health.jsonl"
# Shares of the teacher's value outside of which a warning is given: what it looks like.
LIMITS = {
    "saturation": (0.7, 1.3, "pale", "over-saturated"),
    "detail": (0.5, 1.6, "blurred", "noisy or over-sharpened"),
    "diversity": (0.6, 1.5, "alike for one prompt: modes are lost", "more various"),
}
Values = dict[str, float]


def health(images: UInt8[np.ndarray, "2 n h w 3"]) -> Values:
    """Equations (1) to (3) of two images of each of n prompts, in 0..1."""
    x = images.astype(np.float32) / 255
    return {
        "saturation": float(np.mean(x.max(-1) - x.min(-1))),
        "detail": float(np.mean(np.square(x - _smoothed(x)))),
        "diversity": float(np.sqrt(np.square(x[0] - x[1]).mean((1, 2, 3))).mean()),
    }


def _smoothed(x: Float[np.ndarray, "2 n h w 3"]) -> Float[np.ndarray, "2 n h w 3"]:
    """The mean of the 3 x 3 pixels around each, edges repeated."""
    height, width = x.shape[2:4]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    parts = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.mean(parts, axis=0)


def scored(
    scorers: Sequence[Scorer],
    images: UInt8[np.ndarray, "2 n h w 3"],
    prompts: Sequence[str],
    annotations: Mapping[str, Sequence[Any]],
) -> Values:
    """Mean scores of the images, of the scorers that judge single ones."""
    found: Values = {}
    texts = [*prompts, *prompts]
    twice = {key: [*values, *values] for key, values in annotations.items()}
    flat = images.reshape(-1, *images.shape[2:])
    for scorer in scorers:
        values = scorer.values(flat, texts, twice)
        if all(each.ndim == 1 for each in values.values()):
            found |= scorer.summarise(values)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthLog:
    """`health.jsonl` of a workdir: a row at each preview.

    Attributes:
      path: the file.
    """

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """What is there."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            return [as_object(parse_json(line, str(self.path)), str(self.path)) for line in lines]
        except FileNotFoundError:
            return []
        except ValueError as error:
            logging.warning("%s; it is begun again", error)
            return []

    def write(self, step: int, stage: str, student: Values, teacher: Values) -> None:
        """Appends a row in the place of those from this step on, and tells it in one line."""
        kept = [row for row in self.rows() if row["step"] < step]
        kept.append({"step": step, "stage": stage, "student": student, "teacher": teacher})
        with atomic_write(self.path) as part:
            part.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        logging.info("health at step %d: %s", step, told(student, teacher))
        for warning in warnings(student, teacher):
            logging.warning("health at step %d: %s", step, warning)


def told(student: Values, teacher: Values) -> str:
    """One line: shares of the teacher's values, and the scores of both."""
    shares = [f"{name} {_share(student, teacher, name):.2f}" for name in LIMITS]
    scores = [
        f"{name} {value:.3f} ({teacher[name]:.3f})"
        for name, value in student.items()
        if name not in LIMITS and name in teacher
    ]
    return "; ".join([f"of the teacher's {', '.join(shares)}", *scores])


def warnings(student: Values, teacher: Values) -> list[str]:
    """What has parted from the teacher, a line each."""
    found = []
    for name, (low, high, below, above) in LIMITS.items():
        share = _share(student, teacher, name)
        if not low <= share <= high:
            look = below if share < low else above
            found.append(
                f"{name} is {share:.2f} of the teacher's: the images are {look}, look at samples/"
            )
    return found


def _share(student: Values, teacher: Values, name: str) -> float:
    return student[name] / max(teacher[name], 1e-9)


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The shares over the steps of the whole run, for the report."""
    if len(rows) < 2:
        return []
    steps = [row["step"] for row in rows]
    return [
        Curve(
            "health: share of the teacher's",
            name,
            steps,
            [_share(row["student"], row["teacher"], name) for row in rows],
        )
        for name in LIMITS
    ]
