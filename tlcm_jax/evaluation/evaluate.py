"""Generates with a student at several step counts, beside its teacher, and scores the images.

All contestants see the same prompts and noise. Every score is meant to be read beside two others:
the teacher's at 25 steps, which the student imitates, and that of real images, where the scorer
knows it.

Images are made and scored a chunk of prompts at a time, and only those that are shown are kept in
memory; on disk all are, so that an evaluation that was stopped makes what is missing.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.evaluation import contestants
from tlcm_jax.evaluation.contestants import Contestant, image_chunks, image_store
from tlcm_jax.evaluation.intervals import bootstrap_intervals
from tlcm_jax.evaluation.results import (
    REFERENCE_STEPS,
    Evaluation,
    Generated,
    SetResult,
    chosen,
)
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.value_store import ValueStore, fingerprint
from tlcm_jax.families.base import LatentModel
from tlcm_jax.generation.generate import GenerationOptions
from tlcm_jax.generation.image_store import weights_hash
from tlcm_jax.io.image_size import Resolution

# The teacher as it is used; and with as few steps as the student, which distillation is for.
TEACHER_STEPS = (REFERENCE_STEPS, 4)


def evaluate(
    model: LatentModel,
    prompt_sets: Sequence[PromptSet],
    *,
    lora: Mapping[str, Any] | None = None,
    teacher: LatentModel | None = None,
    steps: Sequence[int] = (1, 2, 3, 4, 8),
    further_steps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] = (8.0,),
    gammas: Sequence[float] = (1.0,),
    student_guidance_scales: Sequence[float] = (1.0,),
    samplers: Sequence[str] = ("consistency",),
    timesteps: Mapping[int, Sequence[int]] | None = None,
    undistilled: Sequence[int] = (),
    baselines: Sequence[Contestant] = (),
    seed: int = 0,
    resolution: Resolution = None,
    scorers: Sequence[Scorer] = (),
    pictures: int = 0,
    store: Path | None = None,
    # Divides the miniature's 400 and 300 prompts; on a CPU larger ones cost more an image.
    batch_size: int = 25,
    progress: bool = False,
) -> Evaluation:
    """Generates from prompt sets with a student and its teacher, and scores the images.

    Args:
      model: the student, or what its adapter belongs to.
      prompt_sets: of different names, at least one.
      lora: the student's adapter, already scaled.
      teacher: the undistilled model; None leaves it out. `model` itself if that, without
        the adapter, is the teacher.
      steps: the student's step counts, each 1 to 8.
      further_steps: those on the sets after the first, where the teacher then has 25 steps only:
        a shorter evaluation. As on the first by default.
      guidance_scales: the teacher's; the first is the one that the student imitates.
      gammas: shares of fresh noise between the student's steps, 0 to 1.
      student_guidance_scales: the student's, where it was distilled without guidance; 1 is none.
      samplers: the student's, keys of `diffusion.samplers.SAMPLERS`.
      timesteps: the student's times by its number of steps, where they are not those of the
        authors' release.
      undistilled: step counts of the teacher by the student's sampler, without guidance.
      baselines: others in the same evaluation.
      seed: of the noise.
      resolution: of the images; the model's own by default.
      scorers: none generates only.
      pictures: prompts of each set whose images are kept in the result; 0 keeps all.
      store: folder where images and what scorers made of them are kept, so that the same ones are
        not made again; None keeps none.
      batch_size: images at a time.
      progress: draw progress bars.

    Raises:
      ValueError: steps out of range, no prompts, two sets of one name, or prompts that a scorer
        cannot score; before anything is generated.
    """
    teacher_weights = functools.cache(lambda: weights_hash(_given(teacher)))

    def student_weights() -> str:
        own = teacher_weights() if model is teacher else weights_hash(model)
        return own if lora is None else f"{own} {weights_hash(model, lora)}"

    def entered(own: Sequence[int], of_teacher: Sequence[int]) -> list[Contestant]:
        found = list(
            contestants.student(
                model,
                lora,
                check_steps(own),
                gammas=gammas,
                scales=student_guidance_scales,
                timesteps=timesteps or {},
                sampler_names=samplers,
                weights=functools.cache(student_weights),
            )
        )
        if teacher is not None:
            found += contestants.teacher(teacher, of_teacher, guidance_scales, teacher_weights)
            found += contestants.undistilled(teacher, undistilled, teacher_weights)
        return [*found, *baselines]

    first = further = entered(steps, TEACHER_STEPS)
    if further_steps is not None:
        further = entered(further_steps, TEACHER_STEPS[:1])
    check_prompt_sets(prompt_sets, scorers)
    options = GenerationOptions(resolution=resolution, batch_size=batch_size, progress=progress)
    known_by = [fingerprint(scorer) if store is not None else "" for scorer in scorers]
    seconds: dict[str, float] = defaultdict(float)
    results = []
    for prompts in prompt_sets:
        shown = np.sort(chosen(prompts, pictures or len(prompts.prompts)))
        generated = []
        for by in first if prompts is prompt_sets[0] else further:
            images: list[np.ndarray] = []
            scores: dict[str, float] = {}
            intervals: dict[str, tuple[float, float]] = {}
            values: list[list[dict[str, np.ndarray]]] = [[] for _ in scorers]
            kept: list[ValueStore | None] = [None] * len(scorers)
            if store is not None:
                folder = image_store(by, prompts, seed, options, store).folder
                kept = [
                    ValueStore(folder, scorer.name, known, prompts.annotations) if known else None
                    for scorer, known in zip(scorers, known_by, strict=True)
                ]
            began, scoring = time.monotonic(), seconds["scoring"]
            for rows, chunk in image_chunks(by, prompts, seed, options, store):
                start = time.monotonic()
                texts = [prompts.prompts[i] for i in rows]
                notes = {k: [v[i] for i in rows] for k, v in prompts.annotations.items()}
                for scorer, found, store_of in zip(scorers, values, kept, strict=True):
                    compute = functools.partial(scorer.values, chunk, texts, notes)
                    found.append(store_of.values(rows, compute) if store_of else compute())
                images.append(chunk[np.isin(rows, shown)])
                seconds["scoring"] += time.monotonic() - start
            seconds["generation"] += time.monotonic() - began - (seconds["scoring"] - scoring)
            start = time.monotonic()
            for scorer, found in zip(scorers, values, strict=True):
                joined = {k: np.concatenate([part[k] for part in found]) for k in found[0]}
                scores |= scorer.summarise(joined)
                intervals |= bootstrap_intervals(scorer, joined)
            seconds["scoring"] += time.monotonic() - start
            generated.append(Generated(by, np.concatenate(images), scores, intervals))
            told = ", ".join(f"{key} {value:.3f}" for key, value in scores.items())
            logging.info("%s, %s: %s", prompts.name, by.label, told or "generated")
        real: dict[str, float] = {}
        for scorer in scorers:
            real |= scorer.real_data_score(prompts.name, len(prompts.prompts))
        results.append(SetResult(prompts, shown, tuple(generated), real))
    return Evaluation(
        model=model.source,
        seed=seed,
        guidance_scale=None if teacher is None else float(guidance_scales[0]),
        gamma=float(gammas[0]),
        measures=tuple(measure for scorer in scorers for measure in scorer.measures),
        sets=tuple(results),
        seconds=dict(seconds),
    )


def _given(teacher: LatentModel | None) -> LatentModel:
    assert teacher is not None
    return teacher


def check_prompt_sets(prompt_sets: Sequence[PromptSet], scorers: Sequence[Scorer]) -> None:
    """Raises a ValueError unless there are prompt sets, each named once, that can be scored."""
    names = [prompts.name for prompts in prompt_sets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompt sets {names}: give at least one, each with its own name")
    for prompts in prompt_sets:
        for scorer in scorers:
            scorer.check(prompts.prompts, prompts.annotations)


def check_steps(steps: Sequence[int | str]) -> list[int]:
    """Step counts as numbers, each once, in order.

    Raises:
      ValueError: none, or one that is no whole number in 1 to 8.
    """
    counts = set()
    for step in steps:
        try:
            counts.add(int(step))
        except ValueError:
            raise ValueError(f"steps: {step!r} is not a number; give 1 to 8") from None
    if not counts:
        raise ValueError("steps is empty: give at least one step count in 1 to 8")
    for count in counts:
        student_timesteps(count)
    return sorted(counts)
