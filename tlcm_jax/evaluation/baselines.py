"""Published few-step models beside a student, each sampled as its authors say.

    --baseline lightning:4=sdxl_lightning_4step_lora.safetensors

| name | sampler | guidance | steps | from |
|---|---|---|---|---|
| lcm | lcm | 1 | 1 to 8 | latent-consistency/lcm-lora-sdxl, lcm-sdxl |
| lightning | euler | 1 | 2, 4 or 8: a file each | ByteDance/SDXL-Lightning |
| hyper_sd | ddim | 1 | 2, 4 or 8: a file each | ByteDance/Hyper-SD, N steps |
| hyper_sd_unified | tcd, eta 1 | 1 | 1 to 8 | ByteDance/Hyper-SD, 1 step, a LoRA for all |
| tcd | tcd, eta 0.3 | 1 | 1 to 8 | h1t/TCD-SDXL-LoRA |
| pcm | ddim | 1 | 2, 4, 8 or 16: a file each | wangfuyun/PCM_Weights, small CFG |
| dmd2 | lcm at 999, 749, 499, 249 | 1 | 4 | tianweiy/DMD2 |
| turbo | euler_ancestral | 1 | 1 to 4 | stabilityai/sdxl-turbo |

Guidance 1 is none: the model is called as it is (their cards write 0). The settings are those of
the model cards as of 2025; none of these weights was run here. A path is a LoRA or a UNet's weights
alone, which go onto the teacher, or a whole pipeline.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tlcm_jax.diffusion import samplers
from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.samplers import Sampler
from tlcm_jax.evaluation.contestants import Contestant
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.load import load_model, with_backbone
from tlcm_jax.generation.generate import generate_by, merged
from tlcm_jax.generation.image_store import weights_hash
from tlcm_jax.io.lora_stack import apply_loras
from tlcm_jax.io.tensors import TensorFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """How a published model is sampled.

    Attributes:
      sampler: from its process and a number of steps.
      steps: that it was made for; several are all that one file takes, unless `one_file_each`.
      one_file_each: whether a file is for one number of steps, which must then be given.
      guidance_scale: w.
    """

    sampler: Callable[[Process, int], Sampler]
    steps: tuple[int, ...]
    one_file_each: bool = False
    guidance_scale: float = 1.0


BASELINES: Mapping[str, Baseline] = {
    "lcm": Baseline(sampler=samplers.lcm, steps=tuple(range(1, 9))),
    "lightning": Baseline(sampler=samplers.euler, steps=(2, 4, 8), one_file_each=True),
    "hyper_sd": Baseline(sampler=samplers.ddim, steps=(2, 4, 8), one_file_each=True),
    "hyper_sd_unified": Baseline(
        sampler=functools.partial(samplers.tcd, eta=1.0), steps=tuple(range(1, 9))
    ),
    "tcd": Baseline(sampler=samplers.tcd, steps=tuple(range(1, 9))),
    "pcm": Baseline(sampler=samplers.ddim, steps=(2, 4, 8, 16), one_file_each=True),
    "dmd2": Baseline(
        sampler=functools.partial(samplers.lcm, timesteps=(999, 749, 499, 249)), steps=(4,)
    ),
    "turbo": Baseline(sampler=samplers.euler_ancestral, steps=(1, 2, 3, 4)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineFile:
    """What `--baseline` names: NAME=PATH or NAME:STEPS=PATH.

    Attributes:
      name: a key of `BASELINES`.
      steps: for which the file is; None for all that it takes.
      path: a LoRA, a UNet's weights, or a whole pipeline.
    """

    name: str
    steps: int | None
    path: str

    @classmethod
    def parse(cls, text: str) -> "BaselineFile":
        """Reads the flag's value; files are looked for, not read.

        Raises:
          ValueError: another form, an unknown name, or steps that it was not made for.
          FileNotFoundError: there is nothing at the path.
        """
        named, equals, path = text.partition("=")
        name, _, steps = named.partition(":")
        if not equals or not path or name not in BASELINES:
            raise ValueError(
                f"--baseline {text}: write NAME=PATH or NAME:STEPS=PATH; names: "
                f"{', '.join(BASELINES)}"
            )
        known = BASELINES[name]
        made_for = ", ".join(map(str, known.steps))
        if steps and not (steps.isdecimal() and int(steps) in known.steps):
            raise ValueError(f"--baseline {text}: {name} is made for {made_for} steps")
        if known.one_file_each and not steps:
            raise ValueError(
                f"--baseline {text}: each file of {name} is for one number of steps, {made_for}: "
                f"write {name}:{known.steps[0]}={path}"
            )
        if not Path(path).exists():
            raise FileNotFoundError(f"--baseline {text}: {path} does not exist")
        return cls(name=name, steps=int(steps) if steps else None, path=path)


def contestants(
    files: Sequence[BaselineFile],
    base: LatentModel,
    steps: Sequence[int],
    load_pipeline: Callable[[str], LatentModel] = load_model,
) -> Iterator[Contestant]:
    """The baselines, one file's weights in memory at a time.

    Args:
      files: which.
      base: the model that LoRAs go onto.
      steps: the student's step counts, of which those are taken that a baseline is made for.
      load_pipeline: reads a whole pipeline.

    Raises:
      ValueError: a baseline that is made for none of the steps.
    """

    @functools.lru_cache(maxsize=1)
    def load(path: str) -> LatentModel:
        if _holds(Path(path), "model_index.json", "first_stage_model."):
            return load_pipeline(path)
        if _holds(Path(path), "", "conv_in.weight"):
            return with_backbone(base, path)
        model, adapter = apply_loras(base, [path])
        if adapter is None:
            return model
        return model.with_params(**{model.backbone: merged(model.params[model.backbone], adapter)})

    @functools.cache
    def hash_of(path: str) -> str:
        return weights_hash(load(path))

    for file in files:
        known = BASELINES[file.name]
        counts = [file.steps] if file.steps else [n for n in steps if n in known.steps]
        if not counts:
            raise ValueError(
                f"--baseline {file.name}: made for {', '.join(map(str, known.steps))} steps, and "
                f"--steps asks for {', '.join(map(str, steps))}"
            )
        for count in counts:

            def draw(prompts, seed, options, file=file, known=known, count=count):
                model = load(file.path)
                sampler = known.sampler(model.process, count)
                scale = known.guidance_scale
                return generate_by(
                    sampler, model, prompts, seed, guidance_scale=scale, options=options
                )

            yield Contestant(
                kind="baseline",
                name=file.name,
                steps=count,
                draw=draw,
                weights=functools.partial(hash_of, file.path),
                how=(file.name, known.guidance_scale),
            )


def _holds(path: Path, file: str, key: str) -> bool:
    """Whether a folder has a file of this name, or a file a tensor whose name begins so."""
    if path.is_dir():
        return bool(file) and (path / file).is_file()
    return any(name.startswith(key) for name in TensorFile([path]))
