"""A whole training run: from a recipe and a workdir to a trained student."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tlcm_jax.config.build import initial_trainable, load_losses, stage_spec
from tlcm_jax.config.controls import PromptMaps, load_control_networks, read_maps
from tlcm_jax.config.inputs import Inputs
from tlcm_jax.config.schema import MAY_CHANGE, ModelSettings, Settings, read
from tlcm_jax.config.stored_pairs import check_contents, open_pairs, stream_seed
from tlcm_jax.config.text_cache import TextCache, cache_texts
from tlcm_jax.config.workdir import CHECKPOINTS
from tlcm_jax.data.buckets import Buckets
from tlcm_jax.data.latents import LatentSet, read_latents
from tlcm_jax.data.pair_store import PairStore
from tlcm_jax.data.prompts import PromptStream, read_prompts, warn_truncated
from tlcm_jax.diffusion.timesteps import check_timesteps, student_timesteps
from tlcm_jax.distillation.networks import BASE, CONTROLS, DECODER, NULL, TERMS
from tlcm_jax.distillation.objective import LATENT_SHAPE, LatentShape, Pairs, repeat
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.load import load_model
from tlcm_jax.io.lora_stack import merge_loras
from tlcm_jax.models import lora
from tlcm_jax.training import distributed, loop
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.lock import WorkdirLock
from tlcm_jax.training.loop import Hook
from tlcm_jax.training.mesh import make_mesh, shard_batch
from tlcm_jax.training.metrics import MetricsWriter
from tlcm_jax.training.preemption import Preemption
from tlcm_jax.training.profile import Profiler
from tlcm_jax.training.repeat import repeat_update
from tlcm_jax.training.sharding import place, to_host, tree_shardings
from tlcm_jax.training.stage import StageSpec
from tlcm_jax.training.workdir import claim_workdir

PROFILE = "profile"
_MAPS = "maps"  # of a batch, before they are part of its conditioning


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished (or preempted) run.

    Attributes:
      model: the teacher, its weights on the mesh.
      adapter: the trained LoRA, scaled: fit for `model.denoiser(lora=...)` and for export. Of a
        network trained whole, its weights, which `models.lora.merge` puts in the teacher's place.
        Their EMA, where the last stage kept one.
      history: the rows of `metrics.jsonl`.
      completed: False when the run was asked to stop; the same command resumes it.
    """

    model: LatentModel
    adapter: Mapping[str, Any]
    history: list[dict]
    completed: bool


def train(
    config: Mapping[str, Any],
    workdir: str | Path,
    *,
    progress: bool = True,
    profile_steps: tuple[int, int] | None = None,
    make_hooks: Callable[[Settings, LatentModel], Sequence[Hook]] = lambda settings, model: (),
    lock: WorkdirLock | None = None,
    preemption: Preemption | None = None,
    debug_step: int = 0,
) -> TrainResult:
    """Runs all stages of a recipe, from the workdir's newest checkpoint if it has one.

    Everything that can be wrong with the input is found before anything is compiled.

    Args:
      config: the recipe as plain nested values.
      workdir: the run's folder.
      progress: whether to draw progress bars.
      profile_steps: the first and last step of a profiler's trace, if there is to be one.
      make_hooks: what else to do on the way, given the recipe and the teacher.
      lock: on the workdir, asked with every row whether it is still held.
      preemption: already listening; None listens while the stages run.
      debug_step: instead of training, repeats this update, counted over all stages, operation by
        operation under `jax_debug_nans`; what it finds is logged.

    Raises:
      ValueError, FileNotFoundError: bad input; the message says what to change.
      RuntimeError: updates are not finite any more, or another run has taken the workdir.
      OSError: the disk is full.
    """
    settings = read(config)
    # As often as rows are written, which they are where hooks are due.
    hooks = [Hook(every=settings.log_every, call=lambda *_: lock.check())] if lock else []
    prompts = read_prompts(settings.prompts)
    mesh = make_mesh(settings.mesh)
    model = load_teacher(settings.model, mesh)
    model.check_teacher()
    for steps in settings.evaluation.steps if settings.evaluation else ():
        check_timesteps(model.process, student_timesteps(steps), f"times of {steps} steps")
    controls = load_control_networks(model, settings.model)
    losses = load_losses(settings, model, [control.network for control in controls])
    resolution = settings.model.size
    stores = {name: open_pairs(settings, name, losses[name]) for name in settings.stages}
    latents = None
    if settings.latents:
        latents = read_latents(settings.latents, model.latent_shape(resolution))
    maps = read_maps(model, settings.model, controls, prompts)
    batches = PromptBatches(model, prompts, mesh, settings, latents, maps)
    specs = [
        stage_spec(
            name,
            stage,
            losses[name],
            mesh,
            batches.of(name, losses[name], stores[name]),
            {},
            batches.texts(name, losses[name], stores[name]),
            batches.stored(losses[name], stores[name]),
        )
        for name, stage in settings.stages.items()
    ]
    for tokenizer in model.tokenizers[:1]:
        warn_truncated(prompts, tokenizer)
    lead = jax.process_index() == 0

    def claim() -> None:
        inputs = Inputs(workdir, settings, prompts)
        claim_workdir(workdir, config, may_change=(*MAY_CHANGE, *inputs.moved))
        inputs.check()
        for name, store in stores.items():
            if store is not None:
                check_contents(f"stages.{name}.paths", store, inputs.contents)
        inputs.write()

    distributed.lead_first(claim)

    adapter_key, run_key = jax.random.split(jax.random.key(settings.seed))
    trainable = initial_trainable(settings, model, adapter_key)
    shared = frozen_params(model, place(model.null_conditioning(resolution), mesh))
    if controls:
        shared[CONTROLS] = tuple(place(control.params, mesh) for control in controls)
    if settings.text_cache:
        found = Inputs(workdir, settings, prompts).contents
        cache = cache_texts(settings.text_cache, model, prompts, mesh, resolution, found)
        # Previews and the final evaluation bring the encoders back for as long as they encode.
        model = model.with_params(**to_host(model.text_params))
        batches.read_from(cache, model.text_params)
    placed: dict[int, PyTree[Array]] = {}
    specs = [
        dataclasses.replace(
            spec, frozen={**shared, TERMS: _place_terms(losses[spec.name], mesh, placed)}
        )
        for spec in specs
    ]
    _log_sizes(settings, trainable, prompts, mesh)

    if debug_step:
        return _repeat(debug_step, specs, trainable, run_key, mesh, model, Path(workdir))
    writer = MetricsWriter(workdir, write=lead)
    checkpoints = Checkpoints(Path(workdir) / CHECKPOINTS, keep=settings.keep)
    try:
        result = loop.run(
            specs,
            trainable,
            run_key,
            checkpoints=checkpoints,
            writer=writer,
            settings=loop.LoopSettings(
                log_every=settings.log_every,
                checkpoint_every=settings.checkpoint_every,
                progress=progress,
                max_skipped=settings.max_skipped_updates,
            ),
            mesh=mesh,
            hooks=[*make_hooks(settings, model), *hooks],
            profiler=Profiler(profile_steps, Path(workdir) / PROFILE),
            preemption=preemption,
        )
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is what is said
            writer.close()
            checkpoints.close()
        raise
    writer.close()
    checkpoints.close()
    return TrainResult(
        model=model,
        adapter=lora.scaled(result.state.trained, settings.adapter.scale),
        history=result.history,
        completed=result.completed,
    )


def _repeat(
    step: int, specs: Sequence[StageSpec], trainable: PyTree[Array], key: Array, mesh: Mesh,
    model: LatentModel, workdir: Path,
) -> TrainResult:  # fmt: skip
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=None)
    try:
        found = repeat_update(specs, trainable, key, step, checkpoints=checkpoints, mesh=mesh)
    finally:
        checkpoints.close()
    logging.warning("%s", found)
    return TrainResult(model=model, adapter={}, history=[], completed=False)


def load_teacher(model: ModelSettings, mesh: Mesh) -> LatentModel:
    """The model that a recipe names, its LoRAs merged in, its weights on a mesh."""
    found = load_model(
        model.path,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        vae=model.vae or None,
        shardings=lambda params: tree_shardings(params, mesh),
    )
    return merge_loras(found, model.loras)


def frozen_params(model: LatentModel, null: PyTree[Array]) -> dict[str, Any]:
    """The frozen tree that all stages share.

    Args:
      model: the teacher.
      null: its `null_conditioning`, placed.
    """
    return {
        BASE: model.params[model.backbone],
        DECODER: model.params[model.decoder],
        NULL: null,
    }


def _place_terms(
    loss: StageLoss, mesh: Mesh, placed: dict[int, PyTree[Array]]
) -> dict[str, PyTree[Array]]:
    """The terms' weights on the mesh; those that stages share, once (by identity, in `placed`)."""
    for term in loss.terms.values():
        if id(term) not in placed:
            placed[id(term)] = place(term.params, mesh)
    return {name: placed[id(term)] for name, term in loss.terms.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """Texts that a stage draws from, their tokens, and what else each has."""

    prompts: Sequence[str]
    tokens: tuple[np.ndarray, ...]
    more: Mapping[str, Any]


class PromptBatches:
    """Encodes prompts on the devices, batch by batch; batch r is a pure function of r.

    Attributes:
      cache: embeddings that take the encoders' place; None encodes.
    """

    def __init__(
        self,
        model: LatentModel,
        prompts: Sequence[str],
        mesh: Mesh,
        settings: Settings,
        latents: LatentSet | None = None,
        maps: Sequence[PromptMaps] = (),
    ):
        """Keeps what every stage shares; the tokens are made once."""
        self.cache: TextCache | None = None
        more = {_MAPS: tuple(maps)} if maps else {}
        self._prompts = _Source(prompts, model.tokenize(prompts), more)
        if latents is not None:
            tokens = model.tokenize(latents.captions)
            self._latents = _Source(latents.captions, tokens, {"latents": latents.latents})
        self._mesh, self._settings = mesh, settings
        self._model, self._params = model.without_weights(), model.text_params
        self._encode = jax.jit(self._model.encode_tokens, static_argnames="resolution")

    def read_from(self, cache: TextCache, text_params: PyTree[Array]) -> None:
        """Takes embeddings of the prompts from a cache, and lets go of the encoders' weights.

        Args:
          cache: of the prompts.
          text_params: what is left to encode other texts with.
        """
        self.cache, self._params = cache, text_params

    def of(
        self, name: str, loss: StageLoss, store: PairStore | None = None
    ) -> Callable[[int], PyTree[Array]]:
        """The batches of one stage, sharded over the mesh.

        Args:
          name: of the stage.
          loss: its loss: whether it needs real latents, and what its terms read of the prompts.
          store: pairs that were drawn before, in whose order the prompts then come.

        Returns:
          `(r) -> {"conditioning", "inputs"}`, and "latents" where needed; with buckets, in the
          conditioning of refill r's size, and `LATENT_SHAPE`.
        """
        source = self._source(loss)
        more = {"inputs": loss.prompt_inputs(source.prompts), **source.more}
        stream = self._stream(name, source, jax.process_index(), jax.process_count(), store)
        model, seed = self._settings.model, stream_seed(self._settings, name)
        buckets = Buckets(model.size_buckets, seed) if model.buckets else None

        def batch(r: int) -> PyTree[Array]:
            rows = stream.indices(r if store is None else r % store.refills)
            here = jax.tree.map(lambda x: x[rows], (source.tokens, more))
            if self.cache is not None and source is self._prompts:
                known, read = shard_batch(self._mesh, (self.cache.rows(rows), here[1]))
                return self._steered(known, read)
            ids, read = shard_batch(self._mesh, here)
            if buckets is None:
                return self._steered(self._encode(self._params, ids, model.size), read)
            size = buckets.at(r)
            shape = LatentShape(self._model.latent_shape(size))
            conditioning = self._encode(self._params, ids, size)
            return {"conditioning": conditioning, LATENT_SHAPE: shape, **read}

        return batch

    def _steered(self, conditioning: PyTree[Array], read: dict[str, Any]) -> dict[str, Any]:
        """A batch, its maps in its conditioning."""
        maps = read.pop(_MAPS, ())
        if maps:
            scales = [control.scale for control in self._settings.model.controls.values()]
            pictures = [jnp.asarray(image, jnp.float32) / 255 for image in maps]
            conditioning = self._model.with_controls(conditioning, pictures, scales)
        return {"conditioning": conditioning, **read}

    def texts(
        self, name: str, loss: StageLoss, store: PairStore | None = None
    ) -> Callable[[int], Sequence[str]]:
        """What the batches of a stage hold over all processes, as text; arguments as of `of`."""
        stream = self._stream(name, self._source(loss), 0, 1, store)
        return lambda r: stream.batch(r if store is None else r % store.refills)

    def stored(
        self, loss: StageLoss, store: PairStore | None
    ) -> Callable[[int, PyTree[Array]], Pairs] | None:
        """The pairs of a store by refill, sharded over the mesh; None where there is no store."""
        if store is None:
            return None
        share = store.rows // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        copies = loss.objective.pairs_per_prompt

        @jax.jit
        def join(fields: dict[str, Array], conditioning: PyTree[Array]) -> Pairs:
            empty: dict[str, Any] = {name: None for name in Pairs._fields} | {"inputs": {}}
            return Pairs(**{**empty, **fields, "conditioning": repeat(conditioning, copies)})

        def pairs(r: int, batch: PyTree[Array]) -> Pairs:
            fields = store.read(r % store.refills, rows)
            return join(shard_batch(self._mesh, fields), batch["conditioning"])

        return pairs

    def _source(self, loss: StageLoss) -> _Source:
        return self._latents if loss.objective.needs_latents else self._prompts

    def _stream(
        self,
        name: str,
        source: _Source,
        process_index: int,
        process_count: int,
        store: PairStore | None,
    ) -> PromptStream:
        seed = stream_seed(self._settings, name)
        return PromptStream(
            source.prompts,
            self._settings.stages[name].refill,
            seed=seed if store is None else store.described["stream_seed"],
            process_index=process_index,
            process_count=process_count,
        )


def _log_sizes(
    settings: Settings, trainable: PyTree[Array], prompts: Sequence[str], mesh: Mesh
) -> None:
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    logging.info(
        "%s: %d prompts, %.2f M trained parameters, mesh %s",
        settings.name,
        len(prompts),
        trained / 1e6,
        dict(mesh.shape),
    )
