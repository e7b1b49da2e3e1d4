"""What a run hands out by its recipe: previews on the way; at its end exports and an evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from tlcm_jax.config import describe
from tlcm_jax.config.run import TrainResult, load_teacher
from tlcm_jax.config.schema import Settings
from tlcm_jax.data.prompt_sets import read_prompt_set
from tlcm_jax.evaluation.final_eval import FinalEval, final_eval
from tlcm_jax.evaluation.previews import Previews
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.load import find_family
from tlcm_jax.io.products import check_products, export_products
from tlcm_jax.models import lora
from tlcm_jax.training.loop import Hook
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.positions import Position
from tlcm_jax.training.sharding import place
from tlcm_jax.training.state import TrainState

EXPORT, SAMPLES = "export", "samples"


def load_outputs(settings: Settings, workdir: Path | None = None) -> FinalEval | None:
    """Loads what the outputs of a recipe need, so that what is missing is found before training.

    Args:
      settings: the recipe.
      workdir: the folder of the run, whose exports must have room there.

    Returns:
      What is evaluated; None if nothing is.

    Raises:
      FileNotFoundError, ValueError: a prompt file, a scorer or a product that there is not.
      FileExistsError: something else lies where an export will.
    """
    if settings.export:
        family, folder = find_family(settings.model.path)
        output = None if workdir is None else workdir / EXPORT
        check_products(family.products, folder, settings.export, output=output)
    chosen = settings.evaluation
    if chosen is None:
        return None
    if not chosen.prompts:
        logging.info("evaluation.prompts is empty: there will be no final evaluation")
        return None
    return FinalEval.load(
        **dataclasses.asdict(chosen),
        name=settings.name,
        seed=settings.seed,
        resolution=settings.model.size,
        timesteps=describe.sampling_times(settings),
        trained_on=describe.training_texts(settings),
    )


def write_outputs(
    run: TrainResult,
    settings: Settings,
    wanted: FinalEval | None,
    workdir: Path,
    config: Mapping[str, Any],
    *,
    started: float,
    progress: bool = True,
) -> None:
    """Exports the student, then evaluates it, into the workdir.

    Args:
      run: a completed run, on this process's own devices.
      settings: its recipe.
      wanted: as `load_outputs` gave it.
      workdir: the run's folder.
      config: the recipe as plain nested values, shown in the report.
      started: `time.monotonic()` when the run began.
      progress: whether to draw progress bars.
    """
    if settings.export:
        card = describe.student_recipe(settings, run.model)
        products = export_products(
            run.model, run.adapter, settings.export, workdir / EXPORT, "fp16", card
        )
        for target, path in products.items():
            logging.info("exported %s: %s", target, path)
    if wanted is not None:
        final_eval(
            wanted,
            run.model,
            run.adapter,
            workdir,
            history=run.history,
            config=config,
            started=started,
            progress=progress,
        )


def preview_hooks(
    settings: Settings, model: LatentModel, workdir: Path, scorers: Sequence[Scorer] = ()
) -> Sequence[Hook]:
    """A hook that draws the previews and tells the student's health (`evaluation.previews`).

    The prompts are the first of the evaluation's, or of the training's where there is none.

    Args:
      settings: the recipe; no hook where its `sample_every` is 0.
      model: the teacher.
      workdir: the run's folder.
      scorers: the evaluation's.
    """
    if not settings.sample_every:
        return ()
    if jax.process_count() > 1:
        logging.warning("sample_every: previews are drawn by runs of one process only")
        return ()
    chosen = settings.evaluation
    previews = Previews(
        folder=workdir,
        model=model,
        prompts=read_prompt_set(((chosen.prompts if chosen else ()) or settings.prompts)[0]),
        seed=settings.seed,
        gamma=describe.gamma(settings),
        timesteps=describe.sampling_times(settings),
        resolution=settings.model.size,
        guidance_scale=chosen.guidance_scale if chosen else None,
        student_guidance_scale=describe.student_guidance_scale(settings),
        scorers=tuple(scorers),
    )

    def preview(position: Position, state: TrainState) -> None:
        adapter = lora.scaled(state.trained, settings.adapter.scale)
        previews.draw(SAMPLES, adapter, position.total, position.name)

    return (Hook(every=settings.sample_every, call=preview),)


def gather_to_local(run: TrainResult, settings: Settings) -> TrainResult:
    """A run of several processes with its weights on this process's own devices.

    Each process then samples and exports by itself. All of them must call this: what is cut over
    them is gathered, and what they held together is given up first, to make room.
    """
    if jax.process_count() == 1:
        return run
    trained = multihost_utils.process_allgather(run.adapter, tiled=True)
    for leaf in jax.tree.leaves((run.adapter, run.model.params)):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    return dataclasses.replace(
        run, model=load_teacher(settings.model, mesh), adapter=place(trained, mesh)
    )
