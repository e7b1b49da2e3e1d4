"""A whole distillation run: from a recipe and a workdir to a trained adapter."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from tlcm_jax.config.build import blueprints, initial_trainable
from tlcm_jax.config.companions import Companions, load_companions
from tlcm_jax.config.schema import MAY_CHANGE, ModelSettings, Settings, StageSettings, read
from tlcm_jax.data.latents import LatentSet, read_latents
from tlcm_jax.data.prompts import PromptStream, read_prompts, warn_truncated
from tlcm_jax.diffusion.sampling import check_timesteps
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.families.load import load_pipeline
from tlcm_jax.families.stable_diffusion import Pipeline
from tlcm_jax.io.workdir import CHECKPOINTS
from tlcm_jax.models import lora
from tlcm_jax.training import loop
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.mesh import make_mesh, shard_batch
from tlcm_jax.training.metrics import MetricsWriter
from tlcm_jax.training.sharding import place, tree_shardings
from tlcm_jax.training.workdir import claim_workdir


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A finished (or preempted) run.

    Attributes:
      pipeline: the teacher, its weights on the mesh.
      adapter: the trained LoRA, scaled: fit for `pipeline.denoiser(lora=...)` and for export. Of
        a UNet trained whole, its weights, which `models.lora.merge` puts in the teacher's place.
        Their average, where the last stage kept one.
      history: the rows of `metrics.jsonl`.
      completed: False when the run was asked to stop; the same command resumes it.
    """

    pipeline: Pipeline
    adapter: Mapping[str, Any]
    history: list[dict]
    completed: bool


def distil(config: Mapping[str, Any], workdir: str | Path, *, progress: bool = True) -> Distilled:
    """Runs all stages of a recipe, from the workdir's newest checkpoint if it has one.

    Everything that can be wrong with the input is found before anything is compiled.

    Args:
      config: the recipe as plain nested values.
      workdir: the run's folder.
      progress: whether to draw progress bars.

    Raises:
      ValueError, FileNotFoundError: bad input; the message says what to change.
      RuntimeError: the loss is not finite any more.
      OSError: the disk is full.
    """
    settings = read(config)
    prompts = read_prompts(settings.prompts)
    mesh = make_mesh(settings.mesh)
    model = settings.model
    pipeline = load_teacher(model, mesh)
    if pipeline.guidance_is_embedded:
        raise ValueError(
            f"{model.path}: this UNet takes the guidance scale as an input (time_cond_proj_dim): it"
            " is a distilled model already; take the model that it was distilled from as teacher"
        )
    for steps in settings.evaluation.steps if settings.evaluation else ():
        check_timesteps(pipeline.schedule, student_timesteps(steps), f"times of {steps} steps")
    companions = load_companions(settings)
    plans = blueprints(settings, pipeline, mesh, companions)
    shape = pipeline.latent_shape(model.resolution or None)
    latents = read_latents(settings.latents, shape) if settings.latents else None
    warn_truncated(prompts, pipeline.tokenizers[0])
    lead = jax.process_index() == 0
    claim_workdir(workdir, config, may_change=MAY_CHANGE, write=lead)

    adapter_key, run_key = jax.random.split(jax.random.key(settings.seed))
    trainable = initial_trainable(settings, pipeline.params["unet"], adapter_key)
    null = pipeline.null_conditioning(model.resolution or None)
    frozen = {
        "unet": pipeline.params["unet"],
        "null": place(null, mesh),
        "vae": pipeline.params["vae"],
        **place(companions.params, mesh),
    }
    _log_sizes(settings, trainable, prompts, mesh)

    batches = PromptBatches(pipeline, prompts, mesh, settings, companions, latents)
    writer = MetricsWriter(workdir, write=lead)
    checkpoints = Checkpoints(Path(workdir) / CHECKPOINTS, keep=settings.keep_checkpoints)
    try:
        result = loop.run(
            [plan.stage(batches.stage(i, plan.settings)) for i, plan in enumerate(plans)],
            trainable,
            frozen,
            run_key,
            checkpoints=checkpoints,
            writer=writer,
            settings=loop.LoopSettings(
                log_every=settings.log_every,
                checkpoint_every=settings.checkpoint_every,
                progress=progress,
            ),
            mesh=mesh,
        )
    finally:
        writer.close()
        checkpoints.close()
    return Distilled(
        pipeline=pipeline,
        adapter=lora.scaled(result.state.trained, settings.adapter.scale),
        history=result.history,
        completed=result.completed,
    )


def load_teacher(model: ModelSettings, mesh: Mesh) -> Pipeline:
    """The model that a recipe names, its weights on a mesh."""
    return load_pipeline(
        model.path,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        shardings=lambda params: tree_shardings(params, mesh),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """Texts that a stage draws from, their tokens, and what else each has."""

    prompts: Sequence[str]
    tokens: tuple[np.ndarray, ...]
    more: Mapping[str, np.ndarray]


class PromptBatches:
    """Encodes prompts on the devices, batch by batch; batch k is a pure function of k."""

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        mesh: Mesh,
        settings: Settings,
        companions: Companions,
        latents: LatentSet | None = None,
    ):
        """Keeps what every stage shares; the tokens are made once."""
        self._companions = companions
        self._prompts = _Source(prompts, pipeline.tokenize(prompts), {})
        if latents is not None:
            tokens = pipeline.tokenize(latents.captions)
            self._latents = _Source(latents.captions, tokens, {"latents": latents.latents})
        self._mesh = mesh
        self._seed = settings.seed
        resolution = settings.model.resolution or None
        self._params = {k: v for k, v in pipeline.params.items() if k.startswith("text_encoder")}
        self._encode = jax.jit(lambda params, ids: pipeline.encode_tokens(params, ids, resolution))

    def stage(self, index: int, settings: StageSettings):
        """The batches of one stage, sharded over the mesh.

        Returns:
          `(k) -> {'conditioning': ...}`, and beside it the texts that the stage's terms read, and
          the real latents of a stage that is made of them.
        """
        source = self._latents if settings.needs_latents else self._prompts
        more = {**self._companions.texts(settings, source.prompts), **source.more}
        stream = PromptStream(
            source.prompts,
            settings.batch_size,
            # A stage of its own order: the second does not begin where the first began.
            seed=1000 * self._seed + index,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        def batch(k: int) -> dict:
            rows = stream.indices(k)
            here = jax.tree.map(lambda x: x[rows], (source.tokens, more))
            ids, read = shard_batch(self._mesh, here)
            return {"conditioning": self._encode(self._params, ids), **read}

        return batch


def _log_sizes(settings: Settings, trainable: Any, prompts: Sequence[str], mesh: Mesh) -> None:
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    logging.info(
        "%s: %d prompts, %.2f M trained parameters, mesh %s",
        settings.name,
        len(prompts),
        trained / 1e6,
        dict(mesh.shape),
    )
