"""From a recipe to the engine's stages: losses with their terms, optimisers, streams of pairs.

Nothing here computes: the same stages run on real weights and are lowered from shapes alone.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from tlcm_jax.config.sample_scores import sample_scores
from tlcm_jax.config.schema import Settings, StageSettings
from tlcm_jax.distillation.networks import AuxNetwork, init_adapter, model_networks
from tlcm_jax.distillation.objective import Pairs, drop_prompts, of_shape, repeat
from tlcm_jax.distillation.terms.base import Term
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.families.base import LatentModel
from tlcm_jax.training.mesh import check_batch
from tlcm_jax.training.optimizers import adamw
from tlcm_jax.training.pairs import PairSource
from tlcm_jax.training.stage import AuxTraining, StageSpec


def load_losses(
    settings: Settings, model: LatentModel, controls: Sequence[Any] = ()
) -> dict[str, StageLoss]:
    """The loss of every stage, the networks of its terms read, by the stage's name.

    Args:
      settings: the recipe.
      model: the teacher, its weights or their shapes.
      controls: the recipe's control networks, without weights.

    Raises:
      ValueError: settings that do not fit the model or each other.
      FileNotFoundError: weights that there are not.
    """
    buckets = [size for size, _ in settings.model.size_buckets]
    for size in buckets:
        model.latent_shape(size)  # a wrong one is found here
    if len(controls) != len(settings.model.controls):
        raise ValueError("model.controls: of the commands `main` alone steers by them")
    networks = model_networks(
        model, settings.adapter, settings.model.size, settings.trainable == "full", controls
    )
    loaded: list[tuple[Any, Term | None]] = []
    losses = {}
    for name, stage in settings.stages.items():
        try:
            objective = stage.settings.build(networks)
            terms = {}
            for term, chosen in stage.terms.items():
                # Stages with the same term share it, and its weights.
                if not (known := [made for like, made in loaded if like == chosen]):
                    known = [chosen.load(model, networks, settings.adapter)]
                    loaded.append((chosen, known[0]))
                if known[0] is not None:
                    terms[term] = known[0]
            losses[name] = StageLoss(objective, terms)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
        if objective.target_is_ema and not stage.ema_decay:
            raise ValueError(f"stages.{name}: target = 'ema' needs one: set ema_decay above 0")
        if objective.needs_latents and not settings.latents:
            raise ValueError(
                f"stages.{name} makes its states of real latents: set `latents` to a file of "
                "them, such as `python -m miniature.encode_latents` writes"
            )
        if objective.needs_latents and buckets:
            raise ValueError(
                f"stages.{name} makes its states of real latents, which are of one size: leave "
                "model.buckets out"
            )
    return losses


def stage_spec(
    name: str,
    settings: StageSettings,
    loss: StageLoss,
    mesh: Mesh,
    batches: Callable[[int], PyTree[Array]],
    frozen: Mapping[str, Any],
    texts: Callable[[int], Sequence[str]] | None = None,
    stored: Callable[[int, PyTree[Array]], Pairs] | None = None,
) -> StageSpec:
    """A stage, checked, ready to run or to be lowered.

    Args:
      name: the recipe's name for it.
      settings: its settings.
      loss: as `load_losses` made it.
      mesh: what its steps run on.
      batches: batch r of `settings.refill` prompts: `{"conditioning": ..}`, and beside it
        "inputs", what the terms read of the prompts, and "latents" and `LATENT_SHAPE` where needed.
      frozen: what its networks read (`distillation.networks`).
      texts: the prompts of batch r, for messages.
      stored: pairs that were drawn before (`PairSource.stored`); they have no `inputs` yet.

    Raises:
      ValueError: settings that do not fit the mesh or each other.
    """
    objective, where = loss.objective, f"stages.{name}"
    check_batch(mesh, settings.refill, f"{where}.prompts_per_refill")
    micro = settings.batch_size // settings.accumulate
    check_batch(mesh, micro, f"{where}: pairs of a micro-batch (batch_size / accumulate)")

    def sample(trainable: Any, frozen: Any, batch: Mapping[str, Any], keys: PRNGKeyArray) -> Pairs:
        if settings.unconditional:
            given = batch["conditioning"]
            null = objective.networks.null_of(frozen)(given)
            shown = drop_prompts(given, null, keys, settings.unconditional)
            batch = {**batch, "conditioning": shown}
        pairs = of_shape(objective, batch).sample_pairs(trainable, frozen, batch, keys)
        return with_inputs(pairs, batch)

    def with_inputs(pairs: Pairs, batch: Mapping[str, Any]) -> Pairs:
        return pairs._replace(inputs=repeat(batch.get("inputs", {}), objective.pairs_per_prompt))

    kept = None if stored is None else lambda r, batch: with_inputs(stored(r, batch), batch)
    try:
        source = PairSource(
            sample=sample,
            batches=batches,
            prompts=settings.refill,
            pairs_per_prompt=objective.pairs_per_prompt,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            uses_student=objective.uses_student,
            annotate=sample_scores(loss, mesh, math.gcd(settings.refill, micro)),
            stored=kept,
            texts=texts,
        )
        optimizer = adamw(
            settings.learning_rate,
            warmup_updates=settings.warmup_steps,
            decay=settings.decay,
            total_updates=settings.steps,
            final_fraction=settings.final_fraction,
            max_grad_norm=settings.max_grad_norm,
            eps=settings.adam_eps,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return StageSpec(
        name=name,
        steps=settings.steps,
        pairs=source,
        loss=loss,
        optimizer=optimizer,
        frozen=frozen,
        nfe_per_pair=nfe_per_pair(loss, settings.epochs, drawn=stored is None),
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
        aux={network.name: _aux(network, settings) for network in loss.aux.values()},
        aux_batch=loss.aux_batch,
        should_stop=loss.should_stop,
    )


def nfe_per_pair(loss: StageLoss, epochs: int, drawn: bool = True) -> float:
    """Network forwards for each visit of a pair, what made it shared out over its visits.

    Args:
      loss: of the stage.
      epochs: visits.
      drawn: whether the stage asks the teacher, or reads what it said before.
    """
    nfe = loss.nfe_per_pair
    if not drawn:
        nfe = dataclasses.replace(nfe, teacher=0.0, rollout=0.0)
    return nfe.visited(epochs).total / epochs


def _aux(network: AuxNetwork, settings: StageSettings) -> AuxTraining:
    """With its optimiser: the student's clip, a constant rate of its own."""
    return AuxTraining(
        init=network.init,
        optimizer=adamw(
            network.learning_rate,
            b1=network.b1,
            max_grad_norm=settings.max_grad_norm,
            eps=settings.adam_eps,
        ),
        loss=network.loss,
        updates=network.updates,
    )


def initial_trainable(settings: Settings, model: LatentModel, key: PRNGKeyArray) -> PyTree[Array]:
    """What the first stage begins with: a fresh adapter, or the teacher's own weights."""
    if settings.trainable == "full":
        return model.params[model.backbone]
    return init_adapter(model, settings.adapter, key)
