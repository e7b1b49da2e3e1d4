"""From a recipe to the engine's stages: who plays which role, and what a step is made of.

Nothing here allocates or computes: the same stages run on real weights and are lowered from
shapes alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tlcm_jax.distillation import stages
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import Objective
from tlcm_jax.interchange.pipeline import Pipeline
from tlcm_jax.models import lora
from tlcm_jax.settings import AdapterSettings, Settings, StageSettings
from tlcm_jax.training.loop import Stage
from tlcm_jax.training.mesh import check_batch
from tlcm_jax.training.optimizers import adamw
from tlcm_jax.training.step import StepSettings, make_step


def networks(pipeline: Pipeline, adapter: AdapterSettings) -> Networks:
    """The roles of one frozen base: no adapter is the teacher, theta the student and target.

    The trainable tree is the adapter; the frozen tree is `{'unet': base, 'null': conditioning}`.
    """

    def merged(trainable: Any, frozen: Any) -> Callable:
        return pipeline.denoiser(lora.merge(frozen["unet"], trainable, adapter.scale))

    def factored(trainable: Any, frozen: Any) -> Callable:
        return pipeline.denoiser(frozen["unet"], lora.scaled(trainable, adapter.scale))

    return Networks(
        student=merged if adapter.merged else factored,
        inference=merged,
        teacher=lambda frozen: pipeline.denoiser(frozen["unet"]),
        null=lambda frozen: frozen["null"],
    )


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A stage before its batches are known.

    Attributes:
      name: the recipe's name for it.
      settings: its settings.
      objective: its pair of functions.
      stage: the engine's stage, given `batches`.
      examples: pairs a step makes.
    """

    name: str
    settings: StageSettings
    objective: Objective
    stage: Callable[[Callable[[int], Any]], Stage]
    examples: int


def blueprints(settings: Settings, pipeline: Pipeline, mesh: Mesh) -> list[Blueprint]:
    """Builds every stage of a recipe, checking all that can be checked before compiling.

    Raises:
      ValueError: settings that do not fit the schedule, the mesh or each other.
    """
    roles = networks(pipeline, settings.adapter)
    shape = pipeline.latent_shape(settings.model.resolution or None)
    return [
        _blueprint(name, stage, roles, pipeline, shape, mesh)
        for name, stage in settings.stages.items()
    ]


def _blueprint(
    name: str,
    settings: StageSettings,
    roles: Networks,
    pipeline: Pipeline,
    shape: tuple[int, int, int],
    mesh: Mesh,
) -> Blueprint:
    kind = stages.find(settings.objective)
    objective = stages.build(settings.objective, roles, pipeline.schedule, shape, settings.settings)
    examples = settings.batch_size * kind.examples_per_prompt(settings.settings)
    parts = settings.updates * settings.accumulate
    where = f"stages.{name}"
    check_batch(mesh, settings.batch_size, f"{where}.batch_size")
    if parts < 1 or examples % parts:
        raise ValueError(
            f"{where}: a step makes {examples} examples, which updates x accumulate = {parts} "
            "cannot divide; change batch_size, updates or accumulate"
        )
    check_batch(mesh, examples // parts, f"{where}: examples a micro-batch")
    optimizer = adamw(
        settings.learning_rate,
        warmup_updates=settings.warmup_updates,
        decay=settings.decay,
        total_updates=settings.steps * settings.updates,
        final_fraction=settings.final_fraction,
        max_grad_norm=settings.max_grad_norm,
    )
    step = make_step(
        objective,
        optimizer,
        StepSettings(updates=settings.updates, accumulate=settings.accumulate),
        mesh,
    )
    evaluations = kind.evaluations_per_sample(settings.settings).total

    def stage(batches: Callable[[int], Any]) -> Stage:
        return Stage(
            name=name,
            step=step,
            optimizer=optimizer,
            steps=settings.steps,
            batches=batches,
            evaluations_per_example=evaluations,
        )

    return Blueprint(name, settings, objective, stage, examples)


def abstract_adapter(settings: Settings, unet_params: Mapping[str, Any]) -> Any:
    """Shapes of the trainable tree."""
    adapter = settings.adapter
    return jax.eval_shape(
        lambda params: lora.init(params, adapter.targets, adapter.rank, jax.random.key(0)),
        unet_params,
    )
