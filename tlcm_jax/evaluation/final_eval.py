"""The end of a run: scores and pictures of the student, the report, and its exports."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from tlcm_jax.config.run import TrainResult, load_teacher
from tlcm_jax.config.schema import Settings, read
from tlcm_jax.data.prompt_sets import PromptSet, read_prompt_set
from tlcm_jax.evaluation import report as evaluation_report
from tlcm_jax.evaluation.evaluate import check_names, check_steps, evaluate
from tlcm_jax.evaluation.reporting.contents import Curve
from tlcm_jax.evaluation.reporting.provenance import provenance
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorers
from tlcm_jax.io.model_card import Recipe
from tlcm_jax.io.products import check_targets, export_products
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.sharding import place

EXPORT = "export"
TEACHER_CACHE = "teacher"


@dataclasses.dataclass(frozen=True)
class Ending:
    """What the end of a run needs besides its student, loaded before the run begins.

    Attributes:
      settings: the recipe.
      sets: prompts to draw.
      scorers: what scores the pictures.
    """

    settings: Settings
    sets: tuple[PromptSet, ...]
    scorers: tuple[Scorer, ...]

    @classmethod
    def prepare(cls, config: Mapping[str, Any]) -> "Ending":
        """Loads what a recipe names, so that what is missing is found before any training.

        Raises:
          FileNotFoundError, ValueError: a prompt file, a scorer or a product that there is not.
        """
        settings = read(config)
        if settings.export:
            check_targets(settings.export)
        chosen = settings.evaluation
        if chosen is None:
            return cls(settings, (), ())
        check_steps(chosen.steps)
        sets = tuple(read_prompt_set(path).first(chosen.limit) for path in chosen.prompts)
        check_names(sets)
        scorers = load_scorers(chosen.scorers)
        for prompts in sets:
            for scorer in scorers:
                scorer.check(prompts.prompts, prompts.annotations)
        return cls(settings, sets, scorers)


def brought_home(run: TrainResult, settings: Settings) -> TrainResult:
    """A run of several processes with its weights on this process's own devices.

    Each process then draws and exports by itself. All of them must call this: what is cut over
    them is gathered, and what they held together is given up first, to make room.
    """
    if jax.process_count() == 1:
        return run
    trained = multihost_utils.process_allgather(run.adapter, tiled=True)
    for leaf in jax.tree.leaves((run.adapter, run.model.params)):
        leaf.delete()
    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    return dataclasses.replace(
        run, model=load_teacher(settings.model, mesh), adapter=place(trained, mesh)
    )


def finish(
    run: TrainResult,
    ending: Ending,
    config: Mapping[str, Any],
    workdir: str | Path,
    *,
    started: float,
    progress: bool = True,
) -> None:
    """Exports the student, then draws, scores and reports it, into the workdir.

    Args:
      run: a completed run.
      ending: as prepared from the same recipe.
      config: the recipe as plain nested values.
      workdir: the run's folder.
      started: `time.monotonic()` at the start of the process.
      progress: whether to draw progress bars.
    """
    settings, workdir = ending.settings, Path(workdir)
    if settings.export:
        recipe = Recipe.from_config(config, run.model)
        products = export_products(
            run.model, run.adapter, settings.export, workdir / EXPORT, "fp16", recipe
        )
        for target, path in products.items():
            logging.info("exported %s: %s", target, path)
    chosen = settings.evaluation
    if chosen is None:
        return
    result = evaluate(
        run.model,
        ending.sets,
        lora=run.adapter,
        teacher=run.model,
        steps=chosen.steps,
        guidance_scale=chosen.guidance_scale,
        gamma=chosen.gamma,
        seed=settings.seed,
        resolution=settings.model.resolution or None,
        scorers=ending.scorers,
        cache=workdir / TEACHER_CACHE,
        progress=progress,
    )
    report = evaluation_report.build_report(
        result,
        title=f"{settings.name}: distilled to 1 to 8 steps",
        summary="The same prompts and noise by the student and by its teacher with guidance. "
        "No prompt shown here was used in training.",
        pictures=chosen.pictures,
        curves=curves(run.history),
        config=config,
        provenance=provenance(time.monotonic() - started),
    )
    evaluation_report.save(workdir, result, report)
    logging.info("report: %s", workdir / "report.html")


def curves(history: list[dict]) -> list[Curve]:
    """Loss, gradient norm and throughput of every stage."""
    shown = (
        ("loss", "loss", "", True),
        ("grad_norm", "gradient norm", "", True),
        ("nfe_per_second", "throughput", "NFE/s", False),
    )
    found = []
    for stage in dict.fromkeys(row["stage"] for row in history):
        rows = [row for row in history if row["stage"] == stage]
        for key, title, unit, log in shown:
            # A stage of one row has no curve; a resumed row may lack its throughput.
            points = [(row["stage_step"], row[key]) for row in rows if row.get(key) is not None]
            if len(points) > 1:
                steps, values = zip(*points, strict=True)
                found.append(Curve(stage, title, steps, values, unit, log))
    return found
