"""Draws pictures from prompts: the student in a few steps, the teacher in many with guidance.

The noise of prompt i depends on (seed, i) alone. So pictures of one seed can be compared across
step counts and between student and teacher, which all start from the same noise, and they do not
depend on how the prompts are cut into batches or over devices.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from tlcm_jax.data.batches import whole_batches
from tlcm_jax.diffusion import sampling as sampler
from tlcm_jax.diffusion.guidance import guided
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.families.stable_diffusion import StableDiffusion
from tlcm_jax.models import lora as adapters
from tlcm_jax.models.conditioning import Conditioning
from tlcm_jax.training.mesh import shard_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How prompts become pictures, besides the model and its sampler.

    Attributes:
      prompts_2: the second text encoder's texts, where they differ (SDXL).
      chunks: of 75 tokens that a prompt may have before it is cut; None for as many as it needs.
      resolution: side of the pictures in pixels; the model's own by default.
      tile: side of the tiles, in latent pixels, that pictures too large to be decoded at once are
        decoded by; 0 decodes at once.
      batch_size: pictures at a time; of the last batch's places some may stay unused.
      progress: draw a progress bar.
    """

    prompts_2: Sequence[str] | None = None
    chunks: int | None = 1
    resolution: int | None = None
    tile: int = 0
    batch_size: int = 64
    progress: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: must be at least 1")
        if self.tile < 0:
            raise ValueError(f"tile = {self.tile}: must be at least 1, or 0 for no tiles")


def generate(
    pipeline: StableDiffusion,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    gamma: float = 1.0,
    options: GenerationOptions = GenerationOptions(),
    timesteps: Sequence[int] | None = None,
) -> np.ndarray:
    """Draws with a distilled model, without guidance.

    A UNet that takes the guidance scale as an input (LCM's) is given
    `pipeline.embedded_guidance`.

    Args:
      pipeline: the model. If its weights lie on a mesh, batches are cut over the mesh.
      prompts: n texts, at least one.
      steps: 1 to 8.
      seed: of the noise.
      lora: an adapter already scaled (`models.lora.scaled`), added to the UNet's weights.
      gamma: share of fresh noise between steps, 1 all of it, 0 none (`diffusion.sampler`).
      options: resolution, batches, long prompts.
      timesteps: the times of the steps; the table of the authors' release by default.

    Returns:
      Pictures, uint8 `[n, h, w, 3]`, in the order of the prompts.

    Raises:
      ValueError: no prompts, or steps, gamma or resolution out of range.
    """
    timesteps = tuple(timesteps or student_timesteps(steps))
    levels = sampler.levels(pipeline.process, timesteps, gamma).astype(np.float32)
    tokens = _tokens(pipeline, prompts, options)
    unet = pipeline.params["unet"]
    if lora is not None:
        unet = merged(unet, lora)
    model = _Model.of(pipeline, options)

    def latents(conditioning: Conditioning, keys: Array) -> Array:
        z = _noise(model, keys, np.uint32(0))
        for step, (t, level) in enumerate(zip(timesteps, levels, strict=True), 1):
            at = np.int32(t), level, keys, np.uint32(step)
            z = _student_step(model, unet, z, *at, conditioning)
        return z

    return _draw(pipeline, model, tokens, seed, options, latents, f"{steps} steps")


def generate_teacher(
    pipeline: StableDiffusion,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float,
    seed: int,
    options: GenerationOptions = GenerationOptions(),
) -> np.ndarray:
    """Draws with the undistilled model: DDIM with classifier-free guidance.

    Args:
      pipeline: the model.
      prompts: n texts, at least one.
      steps: DDIM steps, each of two UNet evaluations; of one where the UNet takes the guidance
        scale as an input.
      guidance_scale: w.
      seed: of the noise; the same as the student's for the same seed.
      options: resolution, batches, long prompts.

    Returns:
      Pictures, uint8 `[n, h, w, 3]`.

    Raises:
      ValueError: no prompts, or steps or resolution out of range.
    """
    timesteps = pipeline.process.grid(steps)
    tokens = _tokens(pipeline, prompts, options)
    scale = float(guidance_scale)
    if pipeline.guidance_is_embedded:
        pipeline = dataclasses.replace(pipeline, embedded_guidance=scale)
        scale = 1.0
    model, unet = _Model.of(pipeline, options), pipeline.params["unet"]
    chunks = tokens[0][0].size // tokens[0].shape[-1]
    null = pipeline.null_conditioning(options.resolution, chunks)

    def latents(conditioning: Conditioning, keys: Array) -> Array:
        z = _noise(model, keys, np.uint32(0))
        for pair in itertools.pairwise((*timesteps, 0)):
            stops = np.asarray(pair, np.int32)
            z = _teacher_step(model, unet, z, stops, conditioning, null, scale)
        return z

    return _draw(pipeline, model, tokens, seed, options, latents, f"teacher, {steps} steps")


@jax.jit
def merged(params: Any, lora: Any) -> Any:
    """UNet weights with a scaled adapter added: `models.lora.merge`, compiled."""
    return adapters.merge(params, lora)


@dataclasses.dataclass(frozen=True)
class _Model:
    """What compiled code depends on besides its arguments, among which are the weights.

    Pipelines that are alike in these, such as one teacher with several adapters merged into it,
    share their compiled code; jit compares and hashes this object.
    """

    networks: tuple
    process: tuple
    embedded_guidance: float
    resolution: int
    tile: int
    functions: StableDiffusion = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, pipeline: StableDiffusion, options: GenerationOptions) -> "_Model":
        table, resolution = pipeline.process, options.resolution or pipeline.resolution
        pipeline.latent_shape(resolution)  # a wrong resolution is found before anything is drawn
        return cls(
            networks=(pipeline.unet, pipeline.vae, *pipeline.text_encoders),
            process=(table.prediction_type, table.alphas_cumprod.tobytes()),
            embedded_guidance=pipeline.embedded_guidance,
            resolution=resolution,
            tile=options.tile,
            # Without its weights, so that jit's cache does not keep them alive.
            functions=dataclasses.replace(pipeline, params={}, tokenizers=()),
        )


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: _Model, params: Any, ids: tuple[Array, ...]) -> Conditioning:
    return model.functions.encode_tokens(params, ids, model.resolution)


# A step is what is compiled, not a whole sampler: times are arguments to it, so that every number
# of steps runs the same code.
@functools.partial(jax.jit, static_argnames="model")
def _student_step(
    model: _Model,
    unet: Any,
    z: Array,
    t: Array,
    level: Array,
    keys: Array,
    step: Array,
    conditioning: Conditioning,
) -> Array:
    denoiser, fresh = model.functions.denoiser(unet), _noise(model, keys, step)
    process = model.functions.process
    return sampler.student_step(denoiser, process, z, t, level, fresh, conditioning)


@functools.partial(jax.jit, static_argnames=("model", "scale"))
def _teacher_step(
    model: _Model,
    unet: Any,
    z: Array,
    stops: Array,
    conditioning: Conditioning,
    null: Conditioning,
    scale: float,
) -> Array:
    family = model.functions
    null_of = functools.partial(family.null_of, null)
    teacher = guided(family.denoiser(unet), scale, null_of)
    times = jnp.broadcast_to(stops, (len(z), 2))
    return teacher_path(teacher, family.process, z, times, conditioning)[1]


@functools.partial(jax.jit, static_argnames="model")
def _decode(model: _Model, params: Any, latents: Array) -> Array:
    pictures = model.functions.decode_latents(params, latents, model.tile)
    return jnp.round(255 * pictures.astype(jnp.float32)).astype(jnp.uint8)


@jax.jit
def _prompt_keys(key: Array, rows: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


@functools.partial(jax.jit, static_argnames="model")
def _noise(model: _Model, keys: Array, step: Array) -> Array:
    """Unit Gaussian latents for the prompts of `keys` `[b]`: `[b, h, w, c]`, new at each step."""
    shape = model.functions.latent_shape(model.resolution)

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    return jax.vmap(draw)(keys)


def _tokens(
    pipeline: StableDiffusion, prompts: Sequence[str], options: GenerationOptions
) -> tuple[np.ndarray, ...]:
    """Token ids for each text encoder, `[n, 77]` or `[n, chunks, 77]`."""
    if not prompts:
        raise ValueError("there is nothing to draw: give at least one prompt")
    return pipeline.tokenize(prompts, options.prompts_2, options.chunks)


def _draw(
    pipeline: StableDiffusion,
    model: _Model,
    tokens: tuple[np.ndarray, ...],
    seed: int,
    options: GenerationOptions,
    latents: Callable[[Conditioning, Array], Array],
    label: str,
) -> np.ndarray:
    """Encodes, samples by `latents(conditioning, keys)` and decodes, batch by batch."""
    count, mesh = len(tokens[0]), _mesh_of(pipeline)
    devices = 1 if mesh is None else mesh.devices.size
    size = -(-min(options.batch_size, count) // devices) * devices
    towers = {k: v for k, v in pipeline.params.items() if k.startswith("text_encoder")}
    decoder = {"vae": pipeline.params["vae"]}
    keys = _prompt_keys(jax.random.key(seed), np.arange(count, dtype=np.uint32))
    pictures = []
    batches = list(whole_batches(count, size))
    for rows in tqdm(batches, desc=label, unit="batch", disable=not options.progress):
        ids, noise_keys = shard_batch(mesh, (tuple(t[rows] for t in tokens), keys[rows]))
        drawn = latents(_encode(model, towers, ids), noise_keys)
        pictures.append(np.asarray(_decode(model, decoder, drawn)))
    return np.concatenate(pictures)[:count]


def _mesh_of(pipeline: StableDiffusion) -> Mesh | None:
    """The mesh that the UNet's weights lie on; None on a single device."""
    sharding = getattr(jax.tree.leaves(pipeline.params["unet"])[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None
