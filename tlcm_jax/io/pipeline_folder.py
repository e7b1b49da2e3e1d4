"""Writes a diffusers pipeline folder, set up so that it samples right with nothing else to know."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.io import names
from tlcm_jax.io.files import atomic_write, cast, save_tensors
from tlcm_jax.io.hub import NETWORKS

# What a component may consist of besides the weights written here. Anything else, pickles above
# all, is left behind.
_DATA = (".json", ".txt", ".model", ".safetensors")
# Components of Stable Diffusion 1.x and 2.x that generation works without.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
# Betas and prediction type as diffusers' older schedulers take them when the config is silent.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}


def lcm_scheduler(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The `LCMScheduler` config of a student, given its teacher's scheduler config.

    With it, diffusers' `LCMScheduler` and the timesteps of docs/method.md are the sampler of
    `diffusion.sampler.sample`; the scheduler's own grid at 1, 2, 4 and 8 steps lies on the same
    eight milestones.

    Args:
      teacher: a `scheduler_config.json` of any class with betas.
    """
    noise = {key: teacher.get(key, default) for key, default in _NOISE.items()}
    return {
        "_class_name": "LCMScheduler",
        **noise,
        "prediction_type": noise["prediction_type"] or "epsilon",
        "original_inference_steps": 8,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def write_component(
    folder: Path, config: Mapping[str, Any], params: Mapping[str, Any], dtype: str = "fp32"
) -> None:
    """Writes one network: `config.json` and its weights in safetensors.

    Args:
      folder: the component's folder; made if it is missing. Its name decides the file's name.
      config: the component's JSON, as the pipeline folder held it.
      params: Flax tree; host or device arrays.
      dtype: one of `files.DTYPES`.

    Raises:
      ValueError: a weight does not fit in the dtype, or is not finite.
      OSError: the folder cannot be written.
    """
    stem = NETWORKS.get(folder.name, "diffusion_pytorch_model")
    write_json(folder / "config.json", strip_local_paths(config))
    tensors = {
        name: cast(f"{folder.name} {name}", value, dtype)
        for name, value in names.to_torch(jax.tree.map(np.asarray, params)).items()
    }
    save_tensors(folder / f"{stem}.safetensors", tensors)


def write_pipeline(
    pipeline: StableDiffusion,
    folder: str | Path,
    *,
    unet: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
    replace: bool = False,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Writes a whole pipeline folder whose scheduler is the student's `LCMScheduler`.

    Args:
      pipeline: every network, and (by its `folder`) where tokenizers are copied from.
      folder: the folder to be; written under another name first, and renamed when whole.
      unet: the student's weights (`models.lora.merge`); the pipeline's own by default.
      dtype: of all weights, one of `files.DTYPES`.
      replace: whether a folder that is already there may be replaced.
      extra: further text files by name, such as `README.md`.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder holds files and `replace` is not given.
      FileNotFoundError: the pipeline's folder, whose tokenizers are needed, is gone.
      ValueError: a weight does not fit in the dtype.
      OSError: the disk is full or the folder cannot be written; nothing half written is left.
    """
    folder = Path(folder)
    params = {**pipeline.params, "unet": pipeline.params["unet"] if unet is None else unet}
    with atomic_write(folder, replace=replace) as part:
        write_configs(pipeline, part)
        for name, tree in params.items():
            write_component(part / name, pipeline.configs[name], tree, dtype)
        for name, text in (extra or {}).items():
            (part / name).write_text(text, encoding="utf-8")
    return folder


def write_configs(pipeline: StableDiffusion, folder: Path) -> None:
    """Writes a pipeline folder without the networks' weights: configs, scheduler, tokenizers.

    Args:
      pipeline: as in `write_pipeline`.
      folder: the folder to make.

    Raises:
      FileNotFoundError: a component that is copied is missing, or pickled.
    """
    source = Path(pipeline.folder)
    folder.mkdir()
    index = dict(pipeline.configs["model_index"])
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    for name in list(index):
        if name in pipeline.params or name == "scheduler" or not is_component(index[name]):
            continue
        if not _copy_data(source / name, folder / name):
            if name not in _OPTIONAL:
                raise FileNotFoundError(
                    f"{source / name} is missing or pickled; the export needs it"
                )
            index[name] = [None, None]
            if name == "safety_checker":
                index["requires_safety_checker"] = False
    for name in pipeline.params:
        write_json(folder / name / "config.json", strip_local_paths(pipeline.configs[name]))
    scheduler = lcm_scheduler(pipeline.configs["scheduler"])
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", strip_local_paths(index))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, keys in order, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_component(entry: Any) -> bool:
    """Whether a `model_index.json` entry names a component: [library, class]."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _copy_data(source: Path, target: Path) -> bool:
    """Copies a component's data files; False when it has none, or its weights are pickled."""
    files = [path for path in sorted(source.glob("*")) if path.is_file()]
    data = [path for path in files if path.suffix in _DATA]
    weights = any(path.suffix == ".safetensors" for path in data)
    pickled = any(path.suffix in (".bin", ".pt", ".ckpt") for path in files)
    if not data or (pickled and not weights):
        return False
    target.mkdir(parents=True)
    for path in data:
        shutil.copyfile(path, target / path.name)
    return True


def strip_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where it once lay: a path of the machine that saved it."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}
