"""Prompts to images: the student in a few steps, the teacher in many with guidance.

The noise of prompt i depends on (seed, i) alone. So images of one seed can be compared across step
counts and between student and teacher, which all start from the same noise, and they do not depend
on how the prompts are cut into batches or over devices.
"""

import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, Num, PyTree, UInt8
from tqdm import tqdm

from tlcm_jax.data.batches import whole_batches
from tlcm_jax.diffusion import editing, samplers, sampling
from tlcm_jax.diffusion.guidance import Denoiser, guided
from tlcm_jax.diffusion.samplers import Sampler
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.families.base import LatentModel
from tlcm_jax.families.product import Params
from tlcm_jax.generation.canvas import Canvas, check_canvas, to_latents
from tlcm_jax.generation.control import Control, Steering
from tlcm_jax.io.image_size import Resolution
from tlcm_jax.models import lora as adapters
from tlcm_jax.training.mesh import known_mesh, shard_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How prompts become images, besides the model and its sampler.

    Attributes:
      prompts_2: the second text encoder's texts, where they differ (SDXL).
      chunks: of 75 tokens that a prompt may have before it is cut; None for as many as it needs.
      negative_prompt: what guidance moves away from, in the place of no text; with guidance only.
      resolution: of the images: an `ImageSize`, text such as `1216x832` (width first), or the
        side of a square; the model's own by default.
      controls: control networks, and the pictures that steer them.
      tile: side of the tiles, in latent pixels, that images too large to be decoded at once are
        decoded by; 0 decodes at once.
      batch_size: images at a time; of the last batch's places some may stay unused.
      first: number of the first prompt, on which with the seed its noise depends: what a part of a
        list is given, so that its images are those of the whole list.
      progress: draw a progress bar.
    """

    prompts_2: Sequence[str] | None = None
    chunks: int | None = 1
    negative_prompt: str | None = None
    resolution: Resolution = None
    controls: Sequence[Control] = ()
    tile: int = 0
    batch_size: int = 64
    first: int = 0
    progress: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: must be at least 1")
        if self.tile < 0:
            raise ValueError(f"tile = {self.tile}: must be at least 1, or 0 for no tiles")


def generate(
    model: LatentModel,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    gamma: float = 1.0,
    options: GenerationOptions = GenerationOptions(),
    timesteps: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Generates with a distilled model.

    Args:
      model: the student. If its weights lie on a mesh, batches are cut over the mesh. A backbone
        that takes the guidance scale as an input (LCM's) is given the model's own.
      prompts: n texts, at least one.
      steps: 1 to 8.
      seed: of the noise.
      lora: an adapter already scaled (`models.lora.scaled`), added to the backbone's weights.
      gamma: share of fresh noise between steps, 1 all of it, 0 none (`diffusion.sampling`).
      options: resolution, batches, long prompts.
      timesteps: the training steps of the sampler's; the table of the authors' release by default.
      guidance_scale: w, for a student that was distilled without guidance; 1 is without.

    Returns:
      Images, in the order of the prompts.

    Raises:
      ValueError: no prompts, or steps, gamma or resolution out of range.
    """
    sampler = samplers.consistency(model.process, steps, gamma, timesteps)
    return generate_by(sampler, model, prompts, seed, lora, guidance_scale, options)


def generate_by(
    sampler: Sampler,
    model: LatentModel,
    prompts: Sequence[str],
    seed: int,
    lora: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    options: GenerationOptions = GenerationOptions(),
    canvas: Canvas | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """As `generate`, by any few-step sampler, and with guidance if it is asked for.

    Args:
      sampler: times and levels of the steps.
      model: see `generate`.
      prompts: n texts, at least one.
      seed: of the noise.
      lora: see `generate`.
      guidance_scale: w of classifier-free guidance; 1 calls the model as it is.
      options: resolution, batches, long prompts.
      canvas: pictures to draw on, from the sampler's first time (`diffusion.editing`). Where a
        mask is drawn over from the noisiest time on, noise alone is begun from, as in diffusers.

    Raises:
      ValueError: no prompts, a resolution out of range, or a canvas that does not fit.
    """
    process, scale = model.process, float(guidance_scale)
    levels = sampler.levels.astype(np.float32)
    times = np.asarray([process.time(t) for t in sampler.timesteps], process.time_dtype)
    static, first = _Static.of(model, options), np.float32(sampler.first)
    tokens, null = _texts(model, static, prompts, options, scale)
    backbone = model.params[model.backbone]
    if lora is not None:
        backbone = merged(backbone, lora)
    check_canvas(model, canvas, len(prompts), options.resolution)
    steering = _steering(model, options, len(prompts), sampler.steps)
    more: dict[str, Any] = {"controls": steering.rows(len(prompts))}
    if canvas is not None:
        more["canvas"] = canvas.rows(len(prompts))
    autoencoder = {model.decoder: model.params[model.decoder]}
    anew = canvas is not None and canvas.masks is not None and times[0] == process.start

    def latents(
        conditioning: PyTree[Array], keys: Key[Array, " b"], more: dict[str, Any]
    ) -> Float[Array, " b *latent"]:
        noise, mask = _noise(static, keys, np.uint32(0)), None
        z = first * noise
        if canvas is not None:
            picture, mask, left = to_latents(static, autoencoder, more["canvas"])
            z = z if anew else _begin(static, picture, noise, times[0])
            if left is not None:
                conditioning, mask = model.with_mask(conditioning, mask, left), None
        for step, (t, level) in enumerate(zip(times, levels, strict=True), 1):
            at = t, level, keys, np.uint32(step)
            told = steering.told(conditioning, more["controls"], step - 1)
            z = _student_step(static, backbone, steering.weights, z, *at, told, null, scale)
            if mask is not None:
                z = _keep(z, mask, picture, noise, level)
        return z

    label = f"{sampler.steps} steps"
    return _generate(model, static, tokens, seed, options, latents, label, more)


def generate_teacher(
    model: LatentModel,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float,
    seed: int,
    options: GenerationOptions = GenerationOptions(),
) -> UInt8[np.ndarray, "n h w 3"]:
    """Generates with the undistilled model: deterministic steps with classifier-free guidance.

    Args:
      model: the teacher.
      prompts: n texts, at least one.
      steps: each of two network forwards; of one where the backbone takes the guidance scale as an
        input.
      guidance_scale: w.
      seed: of the noise; the same as the student's for the same seed.
      options: resolution, batches, long prompts.

    Returns:
      Images, in the order of the prompts.

    Raises:
      ValueError: no prompts, or steps or resolution out of range.
    """
    process, scale = model.process, float(guidance_scale)
    stops = np.asarray((*process.grid(steps), process.end), process.time_dtype)
    check_canvas(model, None, len(prompts), options.resolution)
    steering = _steering(model, options, len(prompts), steps)
    if model.guidance_is_embedded:
        model, scale = model.with_embedded_guidance(scale), 1.0
    static, backbone = _Static.of(model, options), model.params[model.backbone]
    tokens, null = _texts(model, static, prompts, options, scale)

    def latents(
        conditioning: PyTree[Array], keys: Key[Array, " b"], more: dict[str, Any]
    ) -> Float[Array, " b *latent"]:
        z, weights = _noise(static, keys, np.uint32(0)), steering.weights
        for step, pair in enumerate(itertools.pairwise(stops)):
            told = steering.told(conditioning, more["controls"], step)
            z = _teacher_step(static, backbone, weights, z, np.asarray(pair), told, null, scale)
        return z

    label, more = f"teacher, {steps} steps", {"controls": steering.rows(len(prompts))}
    return _generate(model, static, tokens, seed, options, latents, label, more)


def _steering(model: LatentModel, options: GenerationOptions, count: int, steps: int) -> Steering:
    """The controls of the options, checked, their weights where the model's are."""
    size = model.image_size(options.resolution) if options.controls else (0, 0)
    return Steering.of(model, options.controls, count, size, steps, _mesh_of(model))


@jax.jit
def merged(params: Params, lora: Params) -> Params:
    """Weights with a scaled adapter added: `models.lora.merge`, compiled."""
    return adapters.merge(params, lora)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What compiled code depends on besides its arguments, among which are the weights.

    Models that are alike in these, such as one teacher with several adapters merged into it, share
    their compiled code; jit compares and hashes this object.
    """

    key: Hashable
    resolution: Resolution
    tile: int
    networks: tuple[Any, ...]
    model: LatentModel = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, model: LatentModel, options: GenerationOptions) -> "_Static":
        # A wrong resolution is found before anything is generated.
        model.latent_shape(options.resolution)
        key = type(model), model.static_key
        networks = tuple(control.network.network for control in options.controls)
        return cls(key, options.resolution, options.tile, networks, model.without_weights())

    def denoiser(self, backbone: Params, weights: Sequence[Params]) -> Denoiser:
        """The model's, steered by the networks with their `weights`."""
        controls = tuple(zip(self.networks, weights, strict=True))
        return self.model.denoiser(backbone, controls=controls)


@functools.partial(jax.jit, static_argnames="static")
def _encode(static: _Static, params: Params, ids: tuple[Array, ...]) -> PyTree[Array]:
    return static.model.encode_tokens(params, ids, static.resolution)


# A step is what is compiled, not a whole sampler: times are arguments to it, so that every number
# of steps runs the same code.
@functools.partial(jax.jit, static_argnames=("static", "scale"))
def _student_step(
    static: _Static,
    backbone: Params,
    weights: Sequence[Params],
    z: Float[Array, " b *latent"],
    t: Num[Array, ""],
    level: Float[Array, " 3"],
    keys: Key[Array, " b"],
    step: Num[Array, ""],
    conditioning: PyTree[Array],
    null: PyTree[Array],
    scale: float,
) -> Float[Array, " b *latent"]:
    model, fresh = static.model, _noise(static, keys, step)
    denoiser = static.denoiser(backbone, weights)
    denoiser = guided(denoiser, scale, functools.partial(model.null_of, null))
    return sampling.student_step(denoiser, model.process, z, t, level, fresh, conditioning)


@functools.partial(jax.jit, static_argnames="static")
def _begin(
    static: _Static,
    picture: Float[Array, " b *latent"],
    noise: Float[Array, " b *latent"],
    t: Num[Array, ""],
) -> Float[Array, " b *latent"]:
    return editing.begin(static.model.process, picture, noise, t)


_keep = jax.jit(editing.keep)


@functools.partial(jax.jit, static_argnames=("static", "scale"))
def _teacher_step(
    static: _Static,
    backbone: Params,
    weights: Sequence[Params],
    z: Float[Array, " b *latent"],
    stops: Num[Array, " 2"],
    conditioning: PyTree[Array],
    null: PyTree[Array],
    scale: float,
) -> Float[Array, " b *latent"]:
    model = static.model
    null_of = functools.partial(model.null_of, null)
    teacher = guided(static.denoiser(backbone, weights), scale, null_of)
    times = jnp.broadcast_to(stops, (len(z), 2))
    return teacher_path(teacher, model.process, z, times, conditioning)[1]


@functools.partial(jax.jit, static_argnames="static")
def _decode(
    static: _Static, params: Params, latents: Float[Array, " b *latent"]
) -> UInt8[Array, "b h w 3"]:
    images = static.model.decode_latents(params, latents, static.tile)
    return jnp.round(255 * images.astype(jnp.float32)).astype(jnp.uint8)


@jax.jit
def _prompt_keys(key: Key[Array, ""], rows: Num[Array, " n"]) -> Key[Array, " n"]:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@functools.partial(jax.jit, static_argnames="static")
def _noise(
    static: _Static, keys: Key[Array, " b"], step: Num[Array, ""]
) -> Float[Array, " b *latent"]:
    """Unit Gaussian noise of each prompt, for one step; step 0's is the first latent."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return sampling.normal(keys, static.model.latent_shape(static.resolution))


def _texts(
    model: LatentModel,
    static: _Static,
    prompts: Sequence[str],
    options: GenerationOptions,
    scale: float,
) -> tuple[tuple[np.ndarray, ...], PyTree[Array]]:
    """Token ids for each text encoder, `[n, ...]`, and what guidance moves away from, axis 1."""
    if not prompts:
        raise ValueError("there is nothing to generate: give at least one prompt")
    negative, prompts_2 = options.negative_prompt, options.prompts_2
    if negative is None:
        tokens = model.tokenize(prompts, prompts_2, options.chunks)
        null = None if scale == 1 else model.null_conditioning(options.resolution, like=tokens)
        return tokens, null
    if scale == 1:
        raise ValueError("a negative prompt has no effect without guidance: set guidance_scale")
    if prompts_2 is not None:
        prompts_2 = [*prompts_2, negative]
    # Together, so that both have as many chunks.
    ids = model.tokenize([*prompts, negative], prompts_2, options.chunks)
    null = _encode(static, model.text_params, tuple(jnp.asarray(part[-1:]) for part in ids))
    return tuple(part[:-1] for part in ids), null


def _generate(
    model: LatentModel,
    static: _Static,
    tokens: tuple[np.ndarray, ...],
    seed: int,
    options: GenerationOptions,
    latents: Callable[..., Float[Array, " b *latent"]],
    label: str,
    more: dict[str, Any],
) -> UInt8[np.ndarray, "n h w 3"]:
    """Encodes, samples and decodes, batch by batch.

    Samples by `latents(conditioning, keys, more)`, the last a batch's rows of the arrays in `more`,
    which have a row for each prompt.
    """
    count, mesh = len(tokens[0]), _mesh_of(model)
    devices = 1 if mesh is None else mesh.devices.size
    size = -(-min(options.batch_size, count) // devices) * devices
    decoder = {model.decoder: model.params[model.decoder]}
    numbers = np.arange(options.first, options.first + count, dtype=np.uint32)
    keys = _prompt_keys(jax.random.key(seed), numbers)
    images = []
    batches = list(whole_batches(count, size))
    for rows in tqdm(
        batches,
        desc=label,
        unit="batch",
        disable=not options.progress,
        mininterval=0.1 if sys.stderr.isatty() else 300.0,
        maxinterval=300.0,
    ):
        here = jax.tree.map(operator.itemgetter(rows), (tokens, keys, more))
        ids, noise_keys, beside = shard_batch(mesh, here)
        with known_mesh(mesh):
            found = latents(_encode(static, model.text_params, ids), noise_keys, beside)
            images.append(np.asarray(_decode(static, decoder, found)))
    return np.concatenate(images)[:count]


def _mesh_of(model: LatentModel) -> Mesh | None:
    """The mesh that the backbone's weights lie on; None on a single device."""
    sharding = getattr(jax.tree.leaves(model.params[model.backbone])[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None
