"""The model card: what an export is, how to sample with it, and whose licence it is under."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.io.hub import HubId

PROJECT = "tlcm_jax"
# Products that are a file; the first name is the one that diffusers looks for in a folder.
FILES = {
    "lora": "pytorch_lora_weights.safetensors",
    "kohya": "tlcm_kohya.safetensors",
    "single-file": "tlcm_checkpoint.safetensors",
}
_PIPELINE = {
    True: "StableDiffusionXLPipeline",
    False: "StableDiffusionPipeline",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a card says of how a student was made.

    Attributes:
      name: of the student.
      teacher: folder or hub id it was distilled from.
      licence: the teacher's, in words.
      rank: of the adapter; 0 if not known.
      missed: of a LoRA extracted from full weights, the part of their change that it misses; 0
        for one that was trained as such.
      stages: one line for each stage of the recipe.
      sdxl: whether the pipeline is SDXL's.
    """

    name: str
    teacher: str
    licence: str = "not stated"
    rank: int = 0
    missed: float = 0.0
    stages: tuple[str, ...] = ()
    sdxl: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], pipeline: Any) -> "Recipe":
        """Reads a run's config (`config.json`, plain nested values).

        Args:
          config: the recipe that was run.
          pipeline: the teacher, an `LatentModel`.
        """
        stages = config.get("stages") or {}
        order = config.get("stage_order") or list(stages)
        return cls(
            name=str(config.get("name", "student")),
            teacher=_teacher(pipeline.source),
            licence=teacher_licence(Path(pipeline.folder)),
            rank=int((config.get("adapter") or {}).get("rank", 0)),
            stages=tuple(_stage_line(stages[name]) for name in order),
            sdxl=len(pipeline.text_encoders) == 2,
        )

    def metadata(self) -> dict[str, str]:
        """The card in short, for the header of a safetensors file."""
        return {
            "title": f"{self.name} TLCM",
            "teacher": self.teacher,
            "licence": self.licence,
            "recipe": "; ".join(self.stages),
            "timesteps": "; ".join(f"{n}: {_times(n, ' ')}" for n in range(1, 9)),
            "guidance_scale": "0",
            "made_with": PROJECT,
        }


def _teacher(source: str) -> str:
    """A hub id, or a folder's own name: where it lay when it was used is nobody's business."""
    hub_id = HubId.parse(source)
    return Path(source).name if hub_id is None else hub_id.repository


def teacher_licence(folder: Path) -> str:
    """The licence that a teacher's folder states, in words fit for a sentence."""
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n---", 1)[0].splitlines():
            if match := re.fullmatch(r"licen[sc]e: *([\w.+ -]{1,60})", line.strip()):
                return match[1].strip()
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        if (folder / name).is_file():
            return f"see the teacher's {name}"
    return "not stated in its folder"


def model_card(recipe: Recipe, product: str) -> str:
    """The text of `README.md`.

    Args:
      recipe: how the student was made.
      product: one of `products.TARGETS`.
    """
    stages = "\n".join(f"{i}. {line}" for i, line in enumerate(recipe.stages, 1))
    table = "\n".join(f"| {n} | {_times(n)} |" for n in range(1, 9))
    rank = f" of rank {recipe.rank}" if recipe.rank else ""
    form = {
        "lora": f"a LoRA{rank} in diffusers' names",
        "kohya": f"a LoRA{rank} in kohya's names (ComfyUI, A1111; diffusers reads it too)",
        "unet": "the student's UNet, as diffusers' `from_pretrained` reads it",
        "pipeline": "a whole diffusers pipeline, the student's weights merged in",
        "single-file": "a single-file checkpoint for ComfyUI and A1111, the student's weights "
        "merged in; `config` beside it is for diffusers, which otherwise fetches the teacher's",
    }[product]
    return f"""---
library_name: diffusers
tags: [text-to-image, distillation, tlcm]
---
# {recipe.name}, distilled to 1-8 steps

{form[0].upper() + form[1:]}. Distilled from `{recipe.teacher}` with {PROJECT}, a JAX implementation
of TLCM (arXiv 2406.05768), from prompts alone.

## Use
```python
{_snippet(recipe, product)}
```

**Guidance is off** (`guidance_scale=0`): the teacher's guidance is distilled in; guiding again
over-saturates. **Pass the timesteps**: this is the grid that the student was made for, and a
scheduler's own may miss it.

| steps | `timesteps` |
|---|---|
{table}
{_advice(recipe, product)}
## Recipe
Teacher: `{recipe.teacher}`, frozen; no images.
{stages}

## Licence
The teacher's licence applies to its students: {recipe.licence}.
"""


def _snippet(recipe: Recipe, product: str) -> str:
    kind = _PIPELINE[recipe.sdxl]
    draw = f"""image = pipe(
    "a prompt", timesteps=[{_times(4)}], guidance_scale=0,
    generator=torch.Generator().manual_seed(0),
).images[0]"""
    here, base = "path/to/this/folder", _loading(recipe.teacher)
    if product == "pipeline":
        names, load = kind, f'pipe = {kind}.from_pretrained("{here}")'
    elif product == "single-file":
        file = FILES[product]
        names = kind
        load = f'pipe = {kind}.from_single_file("{here}/{file}", config="{here}/config")'
    else:
        names, load = f"LCMScheduler, {kind}", f"pipe = {kind}.{base})"
        scheduler = (
            "pipe.scheduler = LCMScheduler.from_config("
            "pipe.scheduler.config, original_inference_steps=8)"
        )
        if product == "unet":
            names += ", UNet2DConditionModel"
            load = (
                f'unet = UNet2DConditionModel.from_pretrained("{here}")\n'
                f"pipe = {kind}.{base}, unet=unet)\n{scheduler}"
            )
        else:
            load += f'\n{scheduler}\npipe.load_lora_weights("{here}/{FILES[product]}")'
    return f"""import torch
from diffusers import {names}

{load}
{draw}"""


def _loading(teacher: str) -> str:
    """How diffusers loads a teacher, up to further arguments."""
    if teacher.endswith(".safetensors"):
        return f'from_single_file("path/to/{teacher}"'
    return f'from_pretrained("{teacher if "/" in teacher else f"path/to/{teacher}"}"'


def _advice(recipe: Recipe, product: str) -> str:
    if product not in ("lora", "kohya"):
        return ""
    extracted = (
        f"""
The student was trained without a LoRA. This one is the nearest of its rank to what was learnt, and
misses {recipe.missed:.1%} of it: the other products are the student itself.
"""
        if recipe.missed
        else ""
    )
    return f"""{extracted}
## Scale
Alpha equals the rank, so the scale is 1, which is right for the teacher. On fine-tunes of the
teacher start at 1; if pictures look over-sharp or over-saturated, try 0.7 to 0.9
(`pipe.set_adapters`, or the strength in your tool) and a step or two more. Other LoRAs can be
loaded beside it.
"""


def _times(steps: int, separator: str = ", ") -> str:
    return separator.join(str(t) for t in student_timesteps(steps))


def _stage_line(stage: Mapping[str, Any]) -> str:
    settings = stage.get("settings") or {}
    line = (
        f"{stage.get('objective')}: {stage.get('steps')} steps of {stage.get('batch_size')} prompts"
        f", learning rate {stage.get('learning_rate')}"
    )
    if "guidance_scale" in settings:
        line += f", teacher's guidance {settings['guidance_scale']}"
    return line
