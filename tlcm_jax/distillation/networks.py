"""Which parameters each network of a stage uses, as functions of the parameters.

One frozen base serves several roles, by the adapter it is applied with: none for the teacher and
the real score, theta for the student and its target, phi for the fake score, psi for the
discriminator's features. An objective sees these functions and not the base, so closed-form
networks serve as well as a UNet.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray

from tlcm_jax.diffusion.guidance import Denoiser, NullOf, guided
from tlcm_jax.diffusion.process import Process
from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.image_size import Resolution
from tlcm_jax.models import lora
from tlcm_jax.models.lora import LoRAConfig

Params = Mapping[str, Any]
Frozen = Mapping[str, Any]

# The leaves of the frozen tree, beside the terms' own.
BASE, NULL, DECODER, TERMS, CONTROLS = "base", "null", "decoder", "terms", "controls"


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a stage.

    Attributes:
      process: of all of them.
      latent_shape: of one sample.
      student: `(trainable, frozen)` to the denoiser that is trained.
      teacher: `(frozen)` to the pre-trained denoiser, without guidance.
      null_of: `(frozen)` to the unconditional conditioning that belongs to a conditional one.
      inference: the student by another route, for calls without gradients (an adapter merged
        into its base costs nothing a call); None takes `student`.
      decode: `(frozen)` to the decoder, latents to images in 0 .. 1; None where there is none.
    """

    process: Process
    latent_shape: tuple[int, ...]
    student: Callable[[Params, Frozen], Denoiser]
    teacher: Callable[[Frozen], Denoiser]
    null_of: Callable[[Frozen], NullOf]
    inference: Callable[[Params, Frozen], Denoiser] | None = None
    decode: Callable[[Frozen], Callable[[Array], Array]] | None = None

    def target(self, params: Params, frozen: Frozen) -> Denoiser:
        """The student for targets and rollouts.

        Stopped at the parameters, so that its graph is never traced for gradients.
        """
        return (self.inference or self.student)(jax.lax.stop_gradient(params), frozen)

    def guided_teacher(self, frozen: Frozen, guidance_scale: float) -> Denoiser:
        """The teacher under classifier-free guidance."""
        return guided(self.teacher(frozen), guidance_scale, self.null_of(frozen))


@dataclass(frozen=True, kw_only=True)
class AuxNetwork:
    """A network trained beside the student, on what the student makes.

    Attributes:
      name: of its parameters in the training state, and before its metrics.
      init: `(key) -> params`, as before the stage's first step.
      loss: `(params, frozen, outputs, keys) -> (per_sample [n], metrics)`, with `outputs` the
        `StudentOutputs` of a batch and a key for each sample.
      updates: before each of the student's.
      learning_rate: constant.
      b1: decay of the first moment of its AdamW.
    """

    name: str
    init: Callable[[PRNGKeyArray], Params]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    updates: int
    learning_rate: float
    b1: float = 0.9


def model_networks(
    model: LatentModel,
    adapter: LoRAConfig,
    resolution: Resolution = None,
    full: bool = False,
    controls: Sequence[Any] = (),
) -> Networks:
    """The networks of a stage on a model.

    The frozen tree holds `{BASE: the backbone's weights, NULL: null_conditioning, DECODER: its
    weights}`, the last where a term decodes; and under CONTROLS the weights of each control
    network, frozen too, where there are any.

    Args:
      model: the teacher; of its weights only the shapes matter.
      adapter: of the student.
      resolution: of the images; the model's own by default.
      full: the trainable tree is the backbone's own leaves rather than an adapter.
      controls: control networks without weights (`families.controls`) that steer student and
        teacher alike, by the maps that the prompts' conditioning then has
        (`LatentModel.with_controls`).
    """

    def steered(frozen: Frozen) -> tuple[Any, ...]:
        return tuple(zip(controls, frozen[CONTROLS], strict=True)) if controls else ()

    def merged(trainable: Params, frozen: Frozen) -> Denoiser:
        whole = lora.merge(frozen[BASE], trainable, adapter.scale)
        return model.denoiser(whole, controls=steered(frozen))

    def beside(trainable: Params, frozen: Frozen) -> Denoiser:
        return adapted(model, adapter, trainable, frozen, steered(frozen))

    return Networks(
        process=model.process,
        latent_shape=model.latent_shape(resolution),
        student=merged if full else beside,
        teacher=lambda frozen: model.denoiser(frozen[BASE], controls=steered(frozen)),
        null_of=lambda frozen: functools.partial(model.null_of, frozen[NULL]),
        inference=merged,
        decode=lambda frozen: functools.partial(
            model.decode_latents, {model.decoder: frozen[DECODER]}
        ),
    )


def adapted(
    model: LatentModel,
    adapter: LoRAConfig,
    factors: Params,
    frozen: Frozen,
    controls: Sequence[Any] = (),
) -> Denoiser:
    """The backbone with an adapter, merged into its weights or run beside them, steered or not."""
    if adapter.merged:
        return model.denoiser(lora.merge(frozen[BASE], factors, adapter.scale), controls=controls)
    return model.denoiser(frozen[BASE], lora.scaled(factors, adapter.scale), controls)


def adapted_features(
    model: LatentModel, adapter: LoRAConfig, factors: Params, frozen: Frozen
) -> Callable[..., Mapping[str, Array]]:
    """The states of the backbone with an adapter, `(z, t, conditioning) -> {block: state}`."""
    base, beside = frozen[BASE], None
    if adapter.merged:
        base = lora.merge(base, factors, adapter.scale)
    else:
        beside = lora.scaled(factors, adapter.scale)
    return lambda z, t, conditioning: model.predict(
        base, z, t, conditioning, lora=beside, features=True
    )


def init_adapter(model: LatentModel, adapter: LoRAConfig, key: PRNGKeyArray) -> Params:
    """A fresh adapter of the backbone, which changes nothing yet."""
    return lora.init(model.params[model.backbone], adapter.targets, adapter.rank, key)
