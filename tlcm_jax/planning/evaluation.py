"""What an evaluation takes: so many prompts, drawn by a student in a few steps and scored.

A device draws b images at a time, and then, with k steps,

    t = (k t_network(b) + t_decoder(b) + t_texts(b) + sum_s t_s(b)) / b               (1)

seconds an image; n prompts on d devices take t n / d. The network and the decoder are costed as in
a stage, block by block, by the compiler where there is one. The text encoders and the networks of
the scores, which are a few percent of it, by their rooflines: fp32 products at `highest`, six
passes of bf16. Memory is the largest of the three phases', in each of which the weights lie there:

    peak = weights + max(drawing, decoding, scoring).                                  (2)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tlcm_jax.models.blip import BLIPConfig, ImageRewardModel
from tlcm_jax.models.clip import ARCHITECTURES, CLIPModel
from tlcm_jax.models.inception import FIDInception
from tlcm_jax.planning.blocks import distinct_blocks, representatives
from tlcm_jax.planning.flops import count
from tlcm_jax.planning.programs import size
from tlcm_jax.planning.stage import Planner

# Passes of bf16 that a product of fp32 matrices takes at full precision.
_PASSES = 6
_WORDS = 35  # of a text that ImageReward reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What an evaluation needs.

    Attributes:
      prompts: of each of which one image is drawn.
      steps: of the student.
      batch: images at a time, over all devices.
      weights: bytes on a device, by what for, that lie there throughout.
      phases: bytes on a device besides, by phase.
      seconds: of an image on a device, by what for; their sum is (1).
      devices: that share the prompts.
    """

    prompts: int
    steps: int
    batch: int
    weights: Mapping[str, int]
    phases: Mapping[str, int]
    seconds: Mapping[str, float]
    devices: int

    @property
    def peak(self) -> int:
        """Equation (2)."""
        return sum(self.weights.values()) + max(self.phases.values())

    @property
    def hours(self) -> float:
        """Of all prompts; a batch that is not full takes as long as a full one."""
        batches = math.ceil(self.prompts / self.batch)
        return batches * self.batch / self.devices * sum(self.seconds.values()) / 3600


def plan_evaluation(planner: Planner, prompts: int, steps: int, batch: int) -> EvaluationPlan:
    """The plan of an evaluation with the paper's scores (`evaluate --protocol tlcm`).

    Args:
      planner: of the recipe whose student is evaluated.
      prompts: number of them.
      steps: of the student, 1 to 8.
      batch: images at a time, over all devices; rounded up to a multiple of them.
    """
    devices, model, device = planner.topology.devices, planner.model, planner.topology.device
    here = -(-batch // devices)
    network = planner.network(here)
    decoding = _decoder(planner, here)
    ids = tuple(
        jax.ShapeDtypeStruct((here, encoder.config.max_position_embeddings), jnp.int32)
        for encoder in model.text_encoders  # type: ignore[attr-defined]
    )
    resolution = planner.settings.model.size
    texts = count(lambda p, x: model.encode_tokens(p, x, resolution), model.text_params, ids)
    seconds = {
        "network": steps * network.seconds / here,
        "decoder": decoding[0] / here,
        "text encoders": device.roofline(texts, size(model.text_params)) / here,
    }
    largest = 0
    for name, (apply, shapes) in _scores(here).items():
        flops, parameters = count(apply, *shapes), size(shapes[0])
        seconds[f"score {name}"] = device.roofline(_PASSES * flops, parameters) / here
        largest = max(largest, parameters)
    base = size(model.params[model.backbone])
    others = {name: tree for name, tree in model.params.items() if name != model.backbone}
    return EvaluationPlan(
        prompts=prompts,
        steps=steps,
        batch=here * devices,
        weights={
            "network": base,
            "network, adapter merged": base,
            "text encoders, decoder": size(others),
        },
        phases={
            "drawing": network.temporaries,
            "decoding": decoding[1],
            "scoring, the largest network": largest,
        },
        seconds=seconds,
        devices=devices,
    )


def _decoder(planner: Planner, batch: int) -> tuple[float, int]:
    """Seconds of decoding a batch, and bytes beside its weights: the block that needs most."""
    model, compiler = planner.model, planner.compiler
    params = {model.decoder: model.params[model.decoder]}
    blocks = distinct_blocks(model.decode_latents, params, planner.latents)
    likes = representatives(blocks, compiler.roofline)
    seconds, most = 0.0, 0
    for block, like in zip(blocks, likes, strict=True):
        cost = compiler.forward(block, batch, None if like is block else like)
        seconds += block.calls * cost.seconds
        shape = jax.eval_shape(block.module.init_with_output, jax.random.key(0), *block.inputs)[0]
        moved = batch * (size(block.inputs) + size(shape))
        most = max(most, cost.temporaries + moved)
    return seconds, most


def _scores(batch: int) -> dict[str, tuple[Callable, tuple]]:
    """The networks of the paper's scores: what is called, and the shapes of its arguments."""

    def images(side: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)

    def ids(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def of(network: nn.Module, *inputs: Any) -> tuple[Callable, tuple]:
        params = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]

        def apply(params: Any, *inputs: Any) -> Any:
            return network.apply({"params": params}, *inputs)

        return apply, (params, *inputs)

    large = CLIPModel(ARCHITECTURES["ViT-L-14-quickgelu"])
    _, both = of(large, images(224), ids(77))
    return {
        "clip": of(CLIPModel(ARCHITECTURES["ViT-g-14"]), images(224), ids(77)),
        "aesthetic": (
            lambda params, x: large.apply({"params": params}, x, method=large.encode_image),
            both[:2],
        ),
        "image_reward": of(
            ImageRewardModel(BLIPConfig()),
            images(224),
            ids(_WORDS),
            jax.ShapeDtypeStruct((batch, _WORDS), bool),
        ),
        "fid": of(FIDInception(), images(299)),
    }
