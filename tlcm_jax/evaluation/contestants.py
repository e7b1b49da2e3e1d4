"""Who is compared in an evaluation: a student, its teacher and baselines, each with its sampler."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.diffusion import samplers
from tlcm_jax.diffusion.samplers import SAMPLERS
from tlcm_jax.evaluation.reporting.contents import Kind
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.generate import GenerationOptions, generate_by, generate_teacher, merged
from tlcm_jax.generation.image_store import ImageStore
from tlcm_jax.io.image_size import ImageSize

# Images in memory at a time.
_CHUNK = 100
# Prompts, seed and options to images.
Draw = Callable[[Sequence[str], int, GenerationOptions], UInt8[np.ndarray, "n h w 3"]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Contestant:
    """One way of making images of prompts, one row of the table.

    Attributes:
      kind: whose it is.
      name: of a baseline.
      steps: in how many steps.
      variant: what tells it from another of the same kind, name and steps, such as "gamma 0".
      draw: makes the images.
      weights: a function that gives a hash of what it draws with; called where images are kept.
      how: plain values that say how it samples.
    """

    kind: Kind
    name: str = ""
    steps: int
    variant: str = ""
    draw: Draw
    weights: Callable[[], str]
    how: tuple[Any, ...]

    @property
    def label(self) -> str:
        """For people."""
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return ", ".join(part for part in (self.name or self.kind, steps, self.variant) if part)


def student(
    model: LatentModel,
    lora: Mapping[str, Any] | None,
    steps: Sequence[int],
    *,
    gammas: Sequence[float],
    scales: Sequence[float] = (1.0,),
    timesteps: Mapping[int, Sequence[int]],
    sampler_names: Sequence[str],
    weights: Callable[[], str],
) -> Iterator[Contestant]:
    """A student at several step counts, by each sampler and with each gamma.

    Args:
      model: the student, or what its adapter belongs to.
      lora: its adapter, scaled.
      steps: the step counts.
      gammas: shares of fresh noise, of the sampler "consistency".
      scales: of guidance, 1 for none.
      timesteps: its times by number of steps, where they are not the release's.
      sampler_names: keys of `SAMPLERS`.
      weights: gives a hash of both.

    Raises:
      ValueError: an unknown sampler, or what a sampler refuses.
    """
    for name in sampler_names:
        if name not in SAMPLERS:
            raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    ways: list[tuple[str, float | None]] = []
    for name in sampler_names:
        ways += [(name, gamma) for gamma in (gammas if name == "consistency" else (None,))]
    adapted = functools.cache(lambda: _with_lora(model, lora))  # once for all step counts
    for (name, gamma), scale, count in itertools.product(ways, scales, steps):
        parts = [name] * (len(sampler_names) > 1)
        if gamma is None:
            sampler = SAMPLERS[name](model.process, count)
        else:
            sampler = samplers.consistency(model.process, count, gamma, timesteps.get(count))
            parts += [f"gamma {gamma:g}"] * (len(gammas) > 1)
        parts += [f"guidance {scale:g}"] * (len(scales) > 1 or scale != 1)

        def draw(prompts, seed, options, sampler=sampler, scale=scale):
            return generate_by(
                sampler, adapted(), prompts, seed, guidance_scale=scale, options=options
            )

        yield Contestant(
            kind="student",
            steps=count,
            variant=", ".join(parts),
            draw=draw,
            weights=weights,
            how=(name, gamma, list(sampler.timesteps), *([scale] if scale != 1 else [])),
        )


def undistilled(
    model: LatentModel, steps: Sequence[int], weights: Callable[[], str]
) -> Iterator[Contestant]:
    """The teacher by the student's own sampler: what distillation has to add.

    Args:
      model: the teacher.
      steps: the step counts, each 1 to 8.
      weights: gives its hash.
    """
    for one in student(
        model, None, steps, gammas=(1.0,), timesteps={}, sampler_names=("consistency",),
        weights=weights,
    ):  # fmt: skip
        yield dataclasses.replace(one, kind="baseline", name="undistilled")


def teacher(
    model: LatentModel, steps: Sequence[int], scales: Sequence[float], weights: Callable[[], str]
) -> Iterator[Contestant]:
    """The undistilled model at several step counts, with each guidance scale.

    Args:
      model: the teacher.
      steps: the step counts.
      scales: of classifier-free guidance.
      weights: gives its hash.
    """
    for scale, count in itertools.product(scales, steps):

        def draw(prompts, seed, options, count=count, scale=scale):
            return generate_teacher(model, prompts, count, scale, seed, options)

        yield Contestant(
            kind="teacher",
            steps=count,
            variant=f"guidance {scale:g}" if len(scales) > 1 else "",
            draw=draw,
            weights=weights,
            how=("ddim", float(scale)),
        )


def image_chunks(
    by: Contestant,
    prompts: PromptSet,
    seed: int,
    options: GenerationOptions,
    store: Path | None = None,
) -> Iterator[tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "n h w 3"]]]:
    """Rows of a prompt set and their images, some at a time, from the store or made.

    Args:
      by: who makes them.
      prompts: of what.
      seed: of the noise.
      options: batch size, resolution, and whether to draw a progress bar.
      store: folder where images are kept; None keeps none.
    """
    kept = None if store is None else image_store(by, prompts, seed, options, store)
    count, size = len(prompts.prompts), options.batch_size * max(1, _CHUNK // options.batch_size)
    bar = tqdm(total=count, desc=by.label, unit="image", disable=not options.progress)
    options = dataclasses.replace(options, progress=False)
    with bar:
        for start in range(0, max(count - size, 0) + 1, size):
            # What is less than a chunk goes with the last, or it would be compiled by itself.
            rows = np.arange(start, start + size if start + 2 * size <= count else count)
            images = kept.read(rows) if kept is not None else None
            if images is None:
                texts = [prompts.prompts[i] for i in rows]
                images = by.draw(texts, seed, dataclasses.replace(options, first=start))
                if kept is not None:
                    kept.write(rows, images)
            yield rows, images
            bar.update(len(rows))


def image_store(
    by: Contestant, prompts: PromptSet, seed: int, options: GenerationOptions, folder: Path
) -> ImageStore:
    """Where in a folder the images of `image_chunks` are kept."""
    size = ImageSize.read(options.resolution)
    told = size and str(size)
    depends_on = [by.weights(), by.how, by.steps, seed, told, prompts.prompts]
    return ImageStore(folder / prompts.name, by.label, depends_on)


def _with_lora(model: LatentModel, lora: Mapping[str, Any] | None) -> LatentModel:
    if lora is None:
        return model
    return model.with_params(**{model.backbone: merged(model.params[model.backbone], lora)})
