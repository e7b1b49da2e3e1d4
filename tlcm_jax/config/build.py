"""From a recipe to the engine's stages: who plays which role, and what a step is made of.

Nothing here allocates or computes: the same stages run on real weights and are lowered from
shapes alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tlcm_jax.config.companions import Companions
from tlcm_jax.config.schema import AdapterSettings, Settings, StageSettings
from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.networks import Networks, Role
from tlcm_jax.distillation.objective import Critic, Objective
from tlcm_jax.distillation.terms.preference import parted
from tlcm_jax.families.stable_diffusion import Pipeline
from tlcm_jax.models import lora
from tlcm_jax.models.discriminator import Heads, choose_layers
from tlcm_jax.models.unet import feature_widths
from tlcm_jax.training.loop import Stage
from tlcm_jax.training.mesh import check_batch
from tlcm_jax.training.optimizers import adamw
from tlcm_jax.training.players import Player
from tlcm_jax.training.step import StepSettings, make_step


def networks(
    pipeline: Pipeline,
    adapter: AdapterSettings,
    trainable: str = "adapter",
    others: Mapping[str, Any] | None = None,
) -> Networks:
    """The roles of one frozen base, by adapter.

    No adapter is the teacher and the real score, theta the student and target, phi the fake
    score, psi the discriminator's backbone.

    The trainable tree is theta, or with `full` the base's own leaves; the frozen tree holds
    `{'unet': base, 'null': conditioning}`, and what `others`, further roles, read from it.
    """

    def merged(trainable: Any, frozen: Any) -> Callable:
        return pipeline.denoiser(lora.merge(frozen["unet"], trainable, adapter.scale))

    def factored(trainable: Any, frozen: Any) -> Callable:
        return pipeline.denoiser(frozen["unet"], lora.scaled(trainable, adapter.scale))

    adapted = merged if adapter.merged else factored
    return Networks(
        student=merged if trainable == "full" else adapted,
        inference=merged,
        teacher=lambda frozen: pipeline.denoiser(frozen["unet"]),
        null=lambda frozen: frozen["null"],
        fake=Role(initial=lambda key: _fresh(pipeline, adapter, key), network=adapted),
        discriminator=lambda layers: discriminator(pipeline, adapter, layers),
        **(others or {}),
    )


def discriminator(pipeline: Pipeline, adapter: AdapterSettings, layers: tuple[str, ...]) -> Role:
    """Heads on the base's states at some blocks, with an adapter of its own up to its middle.

    Raises:
      ValueError: a block that the UNet does not have.
    """
    config = pipeline.unet.config
    widths = feature_widths(config)
    layers = choose_layers(layers, widths)
    heads = Heads(layers, config.norm_num_groups, pipeline.unet.dtype)

    def initial(key: Any) -> dict:
        adapter_key, head_key = jax.random.split(key)
        # No state depends on the way up.
        below = {
            name: leaves
            for name, leaves in _fresh(pipeline, adapter, adapter_key).items()
            if not name.startswith("up_blocks")
        }
        maps = {layer: jnp.zeros((1, 1, 1, widths[layer])) for layer in layers}
        return {"adapter": below, "heads": heads.init(head_key, maps)["params"]}

    def network(psi: Any, frozen: Any) -> Callable:
        if adapter.merged:
            base = lora.merge(frozen["unet"], psi["adapter"], adapter.scale)
            features = pipeline.features(base)
        else:
            features = pipeline.features(frozen["unet"], lora.scaled(psi["adapter"], adapter.scale))

        def judge(z: Any, t: Any, conditioning: Any) -> Any:
            return heads.apply({"params": psi["heads"]}, features(z, t, conditioning))

        return judge

    return Role(initial=initial, network=network)


def _fresh(pipeline: Pipeline, adapter: AdapterSettings, key: Any) -> dict:
    return lora.init(pipeline.params["unet"], adapter.targets, adapter.rank, key)


def initial_trainable(settings: Settings, unet_params: Mapping[str, Any], key: Any) -> Any:
    """What the first stage begins with: a fresh adapter, or the teacher's own weights."""
    if settings.trainable == "full":
        return unet_params
    return lora.init(unet_params, settings.adapter.targets, settings.adapter.rank, key)


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


def blueprints(
    settings: Settings, pipeline: Pipeline, mesh: Mesh, companions: Companions | None = None
) -> list[Blueprint]:
    """Builds every stage of a recipe, checking all that can be checked before compiling.

    Args:
      settings: the recipe.
      pipeline: the teacher, its weights or their shapes.
      mesh: what the steps run on.
      companions: the networks that terms need besides; none by default.

    Raises:
      ValueError: settings that do not fit the schedule, the mesh or each other.
    """
    companions = companions or Companions()
    shape = pipeline.latent_shape(settings.model.resolution or None)
    plans = []
    for name, stage in settings.stages.items():
        others = companions.roles(stage, pipeline)
        roles = networks(pipeline, settings.adapter, settings.trainable, others)
        stage = dataclasses.replace(stage, terms=companions.terms(stage))
        plans.append(_blueprint(name, stage, roles, pipeline, shape, mesh))
    return plans


def _blueprint(
    name: str,
    settings: StageSettings,
    roles: Networks,
    pipeline: Pipeline,
    shape: tuple[int, int, int],
    mesh: Mesh,
) -> Blueprint:
    kind = stages.find(settings.objective)
    try:
        terms = stages.build_terms(roles, pipeline.schedule, settings.terms)
        objective = stages.build(
            settings.objective, roles, pipeline.schedule, shape, settings.settings, terms
        )
        spending = StepSettings(
            updates=settings.updates,
            accumulate=settings.accumulate,
            epochs=settings.epochs,
            ema_decay=settings.ema_decay,
        )
    except ValueError as error:
        raise ValueError(f"stages.{name}: {error}") from None
    if objective.parts is not None and objective.parts.average and not settings.ema_decay:
        raise ValueError(f"stages.{name}: target = 'average' needs one: set ema_decay above 0")
    examples = settings.batch_size * kind.examples_per_prompt(settings.settings)
    parts = settings.updates * settings.accumulate
    where = f"stages.{name}"
    check_batch(mesh, settings.batch_size, f"{where}.batch_size")
    if examples % parts:
        raise ValueError(
            f"{where}: a step makes {examples} examples, which updates x accumulate = {parts} "
            "cannot divide; change batch_size, updates or accumulate"
        )
    check_batch(mesh, examples // parts, f"{where}: examples a micro-batch")
    optimizer = adamw(
        settings.learning_rate,
        warmup_updates=settings.warmup_updates,
        decay=settings.decay,
        total_updates=settings.steps * settings.epochs * settings.updates,
        final_fraction=settings.final_fraction,
        max_grad_norm=settings.max_grad_norm,
    )
    players = {who: _player(critic, settings) for who, critic in objective.critics.items()}
    step = make_step(objective, optimizer, spending, mesh, players=players)
    evaluations = stages.evaluations(
        settings.objective, settings.settings, terms, settings.epochs
    ).total
    chosen = settings.terms.get("preference")

    def stage(batches: Callable[[int], Any]) -> Stage:
        return Stage(
            name=name,
            step=step,
            optimizer=optimizer,
            steps=settings.steps,
            batches=batches,
            evaluations_per_example=evaluations,
            players=players,
            average=settings.ema_decay > 0,
            **({} if chosen is None else {"enough": parted(chosen)}),
        )

    return Blueprint(name, settings, objective, stage, examples)


def _player(critic: Critic, settings: StageSettings) -> Player:
    """A critic with its optimiser: the student's clip, a constant rate of its own."""
    return Player(
        initial=critic.initial,
        loss=critic.loss,
        optimizer=adamw(critic.learning_rate, b1=critic.b1, max_grad_norm=settings.max_grad_norm),
        updates=critic.updates,
    )


def abstract_adapter(settings: Settings, unet_params: Mapping[str, Any]) -> Any:
    """Shapes of the trainable tree."""
    return jax.eval_shape(
        lambda params: initial_trainable(settings, params, jax.random.key(0)), unet_params
    )
