"""Reads what a run left in its workdir: the config it was run with and the adapter it trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.config.describe import keeps_guidance, sampling_times
from tlcm_jax.config.schema import read
from tlcm_jax.io.image_size import Resolution
from tlcm_jax.io.json_files import read_object
from tlcm_jax.models import lora
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.workdir import CONFIG_FILE

CHECKPOINTS = "checkpoints"


def is_workdir(path: str | Path) -> bool:
    """Whether a folder is a run's, as against a pipeline folder."""
    return (Path(path) / CONFIG_FILE).is_file() and (Path(path) / CHECKPOINTS).is_dir()


def drawn_with(path: str | Path, setting: str, default: float, given: float | None = None) -> float:
    """A number to generate with: the one given, or that of a run's own evaluation, or `default`.

    Args:
      path: a workdir, or anything else.
      setting: "guidance_scale", the teacher's, or "gamma", the student's.
      default: of what is not a workdir, and where the run does not say either.
      given: by the user; None leaves it to the others.
    """
    if given is not None:
        return given
    return _section(path, "evaluation").get(setting, default)


def student_scales(path: str | Path, replaced: bool = False) -> tuple[float, ...]:
    """The guidance scales that a run's student is drawn with, the recommended one first.

    Args:
      path: a workdir, or anything else, which has 1 alone: none.
      replaced: other LoRAs stand in the run's own adapter's place.
    """
    if replaced or not is_workdir(path):
        return (1.0,)
    chosen = read(_config(path)).evaluation
    return (1.0,) if chosen is None else chosen.student_guidance_scales


def check_guidance(path: str | Path) -> None:
    """Raises a ValueError if guidance was distilled into a run's student already."""
    if is_workdir(path) and not keeps_guidance(read(_config(path))):
        raise ValueError(
            "the teacher's guidance is distilled into this student, which draws without: leave "
            "out --guidance_scale and --negative_prompt, or distil with a recipe's variant :guided"
        )


def trained_resolution(path: str | Path) -> Resolution:
    """Of the images that a run was trained for; None for the model's own."""
    return _section(path, "model").get("resolution") or None


def trained_times(path: str | Path) -> dict[int, tuple[int, ...]]:
    """The times that a run's student samples at, by its number of steps; empty if it is no run."""
    return sampling_times(read(_config(path))) if is_workdir(path) else {}


def _config(path: str | Path) -> dict[str, Any]:
    """A run's config; empty for what is not a workdir."""
    if not is_workdir(path):
        return {}
    return read_object(Path(path) / CONFIG_FILE, "workdir")


def _section(path: str | Path, name: str) -> Mapping[str, Any]:
    """A part of a run's config; empty where there is none."""
    found = _config(path).get(name)
    return found if isinstance(found, Mapping) else {}


def load_adapter(
    workdir: str | Path, step: int | None = None
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The config of a run and what it trained.

    Args:
      workdir: the run's folder.
      step: the checkpoint's number, in steps over all stages; the newest by default.

    Returns:
      The config as plain nested values, and the adapter as host arrays, scaled: fit for
      `LatentModel.denoiser(lora=...)` and for export. A tree of whole weights is returned as it is
      (`models.adapters.is_adapter` tells).

    Raises:
      FileNotFoundError: it is not a workdir, or has no (such) checkpoint.
      ValueError: its config is not readable.
      RuntimeError: the checkpoint is damaged.
    """
    folder = Path(workdir)
    if not is_workdir(folder):
        raise FileNotFoundError(
            f"{str(workdir)!r} is not a workdir (no {CONFIG_FILE} and {CHECKPOINTS}/); give the "
            "--workdir of a run of tlcm_jax.main"
        )
    config = read_object(folder / CONFIG_FILE, "workdir")
    settings = read(config)
    checkpoints = Checkpoints(folder / CHECKPOINTS, keep=None)
    try:
        trained = checkpoints.trained(step)
    finally:
        checkpoints.close()
    return config, lora.scaled(trained, settings.adapter.scale)
