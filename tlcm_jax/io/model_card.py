"""The model card: what an export is, how to sample with it, and whose licence it is under.

Names and settings come from recipes and folders: none becomes Markdown, HTML, YAML or Python.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tlcm_jax.io.hub import HubId
from tlcm_jax.io.image_size import ImageSize
from tlcm_jax.io.ldm_names import UNET

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a card says of how a student was made; `config.describe` reads it off a run's settings.

    Attributes:
      name: of the student.
      teacher: folder or hub id it was distilled from.
      loras: merged into the teacher before, each with its weight, in words.
      method: of the distillation, by name.
      times: at which the student is called, by the number of steps.
      gamma: share of fresh noise between the student's steps.
      guidance_scales: of the teacher.
      guidance_scale: that examples of the student draw with, if it was distilled without guidance;
        0 where the teacher's is distilled in.
      ingredients: what was taken from which method, a line each.
      data: what the distillation has read, a sentence.
      size: of the images, in pixels; None is the teacher's own.
      images: the sizes that were trained on, in words.
      trained: what was trained, in words.
      rank: of the adapter; 0 if not known.
      missed: of a LoRA extracted from full weights, the part of their change that it misses; 0
        for one that was trained as such.
      stages: one line for each stage of the recipe.
      sdxl: whether the pipeline is SDXL's.
      licence: the teacher's, in words.
    """

    name: str
    teacher: str
    method: str
    times: Mapping[int, tuple[int, ...]]
    loras: tuple[str, ...] = ()
    gamma: float = 1.0
    guidance_scales: tuple[float, ...] = ()
    guidance_scale: float = 0.0
    ingredients: tuple[str, ...] = ()
    data: str = "not known."
    size: ImageSize | None = None
    images: str = "of the teacher's own size"
    trained: str = "not known"
    rank: int = 0
    missed: float = 0.0
    stages: tuple[str, ...] = ()
    sdxl: bool = True
    licence: str = "not stated"

    def metadata(self) -> dict[str, str]:
        """The card in short, for the header of a safetensors file."""
        return {
            "title": f"{self.name}, {self.method}",
            "teacher": self.teacher,
            "licence": self.licence,
            "recipe": "; ".join(self.stages),
            "timesteps": "; ".join(f"{n}: {_join(times, ' ')}" for n, times in self.times.items()),
            "gamma": f"{self.gamma:g}",
            "guidance_scale": f"{self.guidance_scale:g}",
            "made_with": PROJECT,
        }

    @property
    def cfg(self) -> float:
        """The scale as tools count it, in which 1 is none."""
        return self.guidance_scale or 1.0


def teacher_name(source: str) -> str:
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


def headline(recipe: Recipe) -> int:
    """The number of steps that examples draw in: four, as the paper's, or as many as there are."""
    return min(4, max(recipe.times))


def plain_text(text: str) -> str:
    """A name as one line of text that Markdown and HTML show as it stands."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"[\\`*\[\]<>&|#~!]", lambda found: f"&#{ord(found[0])};", line)


def _code(text: str) -> str:
    """A line within backticks, which it cannot end."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f"`{line.replace('`', chr(39))}`"


def model_card(recipe: Recipe, product: str, tools: str = "") -> str:
    """The text of `README.md`.

    Args:
      recipe: how the student was made.
      product: a form of the family's table.
      tools: sections on other programs than diffusers, Markdown.
    """
    stages = "\n".join(f"{i}. {_code(line)}" for i, line in enumerate(recipe.stages, 1))
    ingredients = "\n".join(f"- {plain_text(line)}" for line in recipe.ingredients)
    table = "\n".join(f"| {n} | {_join(times)} |" for n, times in recipe.times.items())
    tags = [name.strip().lower().replace(" ", "-") for name in recipe.method.split("+")]
    scales = " and ".join(f"{scale:g}" for scale in recipe.guidance_scales)
    guidance = f"the teacher's, scale {scales}, is" if scales else "the teacher's is"
    guided = f"**Guidance is off** (`guidance_scale=0`): {guidance} distilled in."
    if recipe.guidance_scale:
        guided = (
            "**Guidance is yours** (`guidance_scale`, 1 for none, and `negative_prompt`): the "
            "teacher was called without it, and the student takes it as the teacher does. A guided "
            "step is two calls."
        )
    rank = f" of rank {recipe.rank}" if recipe.rank else ""
    form = {
        "lora": f"a LoRA{rank} in diffusers' names, for diffusers alone",
        "kohya": f"a LoRA{rank} in kohya's names, which ComfyUI, A1111, Forge, sd-scripts and "
        "diffusers all take whole",
        UNET: "the student's UNet, as diffusers' `from_pretrained` reads it",
        "pipeline": "a whole diffusers pipeline, the student's weights merged in",
        "single-file": "a single-file checkpoint for ComfyUI, A1111, Forge and sd-scripts, the "
        "student's weights merged in; `config` beside it is for diffusers, which otherwise fetches "
        "the teacher's",
    }[product]
    return f"""---
library_name: diffusers
tags: [{", ".join(["text-to-image", "distillation", *tags])}]
---
# {plain_text(recipe.name)}, distilled to {min(recipe.times)} to {max(recipe.times)} steps by \
{recipe.method}

{form[0].upper() + form[1:]}. Distilled from {_code(recipe.teacher)} with {PROJECT}.

## Use
```python
{_snippet(recipe, product)}
```

{guided}
**Pass the timesteps**: they are this student's, and a scheduler's own grid is another.
{_sampler(recipe).remark}

| steps | `timesteps` |
|---|---|
{table}
{tools}{_advice(recipe, product)}
## Recipe
- Teacher: {_code(recipe.teacher)}{_merged(recipe)}, frozen
- Trained: {plain_text(recipe.trained)}
- Data: {recipe.data}
- Images: {recipe.images}
- Method: {recipe.method}

{ingredients}

Stages, in order:

{stages}

## Licence
The teacher's licence applies to its students: {plain_text(recipe.licence)}.
"""


class _Sampler(NamedTuple):
    """How diffusers draws as the student is drawn: a scheduler, and what goes with the call."""

    scheduler: str
    options: str
    call: str
    remark: str


def _sampler(recipe: Recipe) -> _Sampler:
    if recipe.gamma == 1:
        remark = "Every step's noise is fresh (gamma 1), as `LCMScheduler` has it."
        return _Sampler("LCMScheduler", "original_inference_steps=8", "", remark)
    if recipe.gamma == 0:
        remark = (
            "No step adds noise (gamma 0): on these times that is `EulerDiscreteScheduler`, which "
            "is DDIM to x0."
        )
        return _Sampler("EulerDiscreteScheduler", 'timestep_spacing="leading"', "", remark)
    remark = (
        f"A share of the noise is fresh (gamma {recipe.gamma:g}), as `TCDScheduler` has it with "
        f"that `eta`; its last step ends at time 0, where {PROJECT}'s ends at x0, so images differ "
        "by a trace of noise."
    )
    return _Sampler("TCDScheduler", "", f" eta={recipe.gamma:g},", remark)


def _snippet(recipe: Recipe, product: str) -> str:
    kind, sampler = _PIPELINE[recipe.sdxl], _sampler(recipe)
    times = recipe.times[headline(recipe)]
    size = ""
    if recipe.size is not None:
        size = f" height={recipe.size.height}, width={recipe.size.width},"
    draw = f"""image = pipe(
    "a prompt", timesteps=[{_join(times)}], guidance_scale={recipe.guidance_scale:g},{sampler.call}
    generator=torch.Generator().manual_seed(0),{size}
).images[0]"""
    here, base = "path/to/this/folder", _loading(recipe.teacher)
    names = f"{sampler.scheduler}, {kind}"
    options = f", {sampler.options}" if sampler.options else ""
    scheduler = f"pipe.scheduler = {sampler.scheduler}.from_config(pipe.scheduler.config{options})"
    if product == "pipeline":
        load = f'pipe = {kind}.from_pretrained("{here}")'
    elif product == "single-file":
        load = f'pipe = {kind}.from_single_file("{here}/{FILES[product]}", config="{here}/config")'
    elif product == UNET:
        names += ", UNet2DConditionModel"
        load = (
            f'unet = UNet2DConditionModel.from_pretrained("{here}")\n'
            f"pipe = {kind}.{base}, unet=unet)"
        )
    else:
        load = f'pipe = {kind}.{base})\npipe.load_lora_weights("{here}/{FILES[product]}")'
    if product in ("pipeline", "single-file") and sampler.scheduler == "LCMScheduler":
        names, scheduler = kind, ""  # it is the folder's own
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {names}",
            "",
            load,
            *([scheduler] if scheduler else []),
            draw,
        ]
    )


def _loading(teacher: str) -> str:
    """How diffusers loads a teacher, up to further arguments."""
    path = teacher if "/" in teacher else f"path/to/{teacher}"
    # A name may hold quotes and line ends; so may no literal of the snippet.
    literal = json.dumps(path).replace("`", "\\u0060")
    kind = "from_single_file" if teacher.endswith(".safetensors") else "from_pretrained"
    return f"{kind}({literal}"


def _advice(recipe: Recipe, product: str) -> str:
    if product not in ("lora", "kohya"):
        return ""
    beside = (
        f"""
## Beside it
The teacher had other LoRAs merged into it, and this file holds what was learnt on top of them
alone: load them too, with these weights, or take the product `pipeline` or `single-file`, which
hold both.
{chr(10).join(f"- {_code(line)}" for line in recipe.loras)}
"""
        if recipe.loras
        else ""
    )
    extracted = (
        f"""
The student was trained without a LoRA. This one is the nearest of its rank to what was learnt, and
misses {recipe.missed:.1%} of it: the other products are the student itself.
"""
        if recipe.missed
        else ""
    )
    return f"""{beside}{extracted}
## Scale
Alpha equals the rank, so the scale is 1, which is what was trained. On other fine-tunes of the
teacher begin with 1, and lower it (`pipe.set_adapters`, or the strength in your tool) where images
look over-sharp or over-saturated.
"""


def _merged(recipe: Recipe) -> str:
    named = "; ".join(map(_code, recipe.loras))
    return f" with these LoRAs merged in: {named}" if recipe.loras else ""


def _join(times: Sequence[int], separator: str = ", ") -> str:
    return separator.join(str(t) for t in times)
