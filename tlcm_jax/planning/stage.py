"""A stage of a recipe on a topology: the memory of a device, and what a step takes.

A step's time is the network calls that it makes, each the sum of its blocks' costs, and beside
them what weights, optimiser and gradients take on their way:

    t = sum_k calls_k t_k(batch) + optimiser + merging + communication,         (1)

with the calls of `StageLoss.nfe_per_pair`. What a refill costs is shared out over its steps. The
memory is that of the update, in which the student's activations are kept:

    peak = weights + state + gradients + pairs + kept activations + temporaries.   (2)
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import PyTree

from tlcm_jax.config.build import initial_trainable, load_losses, stage_spec
from tlcm_jax.config.schema import Settings, StageSettings
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.families.base import LatentModel
from tlcm_jax.planning.blocks import Block, distinct_blocks, representatives
from tlcm_jax.planning.cost import Compiler, Cost
from tlcm_jax.planning.topologies import Topology
from tlcm_jax.training.mesh import AXES, mesh_sizes
from tlcm_jax.training.sharding import tree_shardings

# The part of a device's memory that a program may fill; the rest is the runtime's.
USABLE = 0.96


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage needs.

    Attributes:
      name: of the stage.
      steps: updates of the student.
      pairs: of an update, over all devices.
      batch: pairs of a micro-batch on a device.
      memory: bytes on a device, by what for; its sum is (2).
      seconds: of a step, by what for; its sum is (1).
      flops: of a step on a device, counted.
      collectives: bytes that a device sends in a step, by what for.
      notes: what the model leaves out.
    """

    name: str
    steps: int
    pairs: int
    batch: int
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    flops: float
    collectives: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Equation (2)."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Equation (1)."""
        return sum(self.seconds.values())


class Planner:
    """Plans the stages of one recipe on one topology; nothing of it is run."""

    def __init__(
        self,
        settings: Settings,
        model: LatentModel,
        topology: Topology,
        compiler: Compiler,
        every_block: bool = False,
    ):
        """Traces the network once.

        Args:
          settings: the recipe.
          model: its teacher, shapes for weights.
          topology: what it is to run on.
          compiler: of its device.
          every_block: compile every distinct block, not one of each kind (`representatives`).

        Raises:
          ValueError: a mesh that does not fit the devices, settings that do not fit the model.
        """
        self.settings, self.model, self.topology = settings, model, topology
        self.compiler = compiler
        self._costs: dict[tuple[int, bool], Cost] = {}
        sizes = mesh_sizes(settings.mesh, topology.devices)
        self.mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        resolution = settings.model.size
        ids = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _one_token(model))
        self.conditioning = jax.eval_shape(
            lambda params, ids: model.encode_tokens(params, ids, resolution),
            model.text_params, ids,
        )  # fmt: skip
        self.latents = jax.ShapeDtypeStruct((1, *model.latent_shape(resolution)), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.int32)
        self.blocks = distinct_blocks(
            model.predict, model.params[model.backbone], self.latents, time, self.conditioning,
            remat=settings.model.remat,
        )  # fmt: skip
        self._every_block = every_block
        self._likes: list[Block | None] = [None] * len(self.blocks)
        if not every_block:
            found = representatives(self.blocks, compiler.roofline)
            pairs = zip(self.blocks, found, strict=True)
            self._likes = [None if block is like else like for block, like in pairs]
        kept, self.left_out = _without_files(settings)
        self.losses = load_losses(kept, model)

    def plan(self, name: str) -> StagePlan:
        """One stage.

        Raises:
          ValueError: a batch that the mesh does not divide; the message names the nearest.
        """
        stage, loss = self.settings.stages[name], self.losses[name]
        spec: Any = stage_spec(name, stage, loss, self.mesh, lambda r: None, {})  # type: ignore[arg-type]
        devices = self.topology.devices
        batch = stage.batch_size // stage.accumulate // devices
        prompts = stage.refill // devices
        adapter = jax.eval_shape(
            lambda: initial_trainable(self.settings, self.model, jax.random.key(0))
        )
        state = jax.eval_shape(lambda a: spec.create_state(a, jax.random.key(0)), adapter)

        student = self.network(batch, gradient=True)
        calls = self._calls(stage, loss, batch, prompts)
        seconds = {what: count * cost.seconds for what, (count, cost) in calls.items()}
        flops = sum(count * cost.flops for count, cost in calls.values())
        base = self._bytes(self.model.params[self.model.backbone])
        gradients = self._bytes(adapter, jnp.float32)
        device = self.topology.device
        merges = self._merges(stage, loss, spec.pairs.steps_per_refill)
        seconds["merging the adapter"] = merges * 2 * base / device.bandwidth
        seconds["optimiser"] = (2 * self._bytes(state.networks) + gradients) / device.bandwidth
        collectives = self._collectives(stage, adapter, base, calls)
        exposed = sum(collectives.values()) / device.link
        if "weights gathered" in collectives:
            # Fetched while the layers before them compute, as far as there is time for it.
            hidden = min(collectives["weights gathered"] / device.link, sum(seconds.values()))
            exposed -= hidden
        seconds["communication"] = exposed

        others = {
            component: tree
            for component, tree in self.model.params.items()
            if component != self.model.backbone
            # With their texts cached the encoders leave the devices.
            and not (self.settings.text_cache and component in self.model.text_params)
        }
        memory = {
            "frozen weights": base,
            "text encoders, decoder": self._bytes(others),
            "trained weights, optimiser": self._bytes(state.networks),
            "gradients": gradients,
            "pairs": 2 * self._pair_bytes() * stage.refill // devices * spec.pairs.pairs_per_prompt,
            "activations kept": student.kept,
            "temporaries": student.temporaries,
        }
        if loss.nfe_per_pair.rollout and self.settings.trainable == "adapter":
            # Merged before the loop of a rollout's steps, whole.
            memory["merged weights"] = base
        return StagePlan(
            name=name,
            steps=stage.steps,
            pairs=stage.batch_size,
            batch=batch,
            memory=memory,
            seconds=seconds,
            flops=flops,
            collectives=collectives,
            notes=tuple(f"not in it: the term {term}" for term in self.left_out[name]),
        )

    def network(self, batch: int, gradient: bool = False) -> Cost:
        """One call of the network on a device, with `batch` samples."""
        if (batch, gradient) not in self._costs:
            twice = self._costs.get((2 * batch, gradient))
            if twice is None or gradient or self._every_block:
                cost = self._sum(batch, gradient)
            else:
                # As a block is told from one of its kind (`cost`, equation 1).
                smaller, larger = self._bound(batch), self._bound(2 * batch)
                cost = dataclasses.replace(
                    twice, seconds=twice.seconds * smaller / larger, flops=twice.flops // 2
                )
            self._costs[batch, gradient] = cost
        return self._costs[batch, gradient]

    def _bound(self, batch: int) -> float:
        """The roofline's seconds of one call without gradients, block by block."""
        return sum(block.calls * self.compiler.roofline(block, batch) for block in self.blocks)

    def _sum(self, batch: int, gradient: bool) -> Cost:
        adapter = self.settings.adapter if self.settings.trainable == "adapter" else None

        def cost(block: Block, like: Block | None) -> Cost:
            if gradient:
                return self.compiler.gradient(block, batch, adapter, like)
            return self.compiler.forward(block, batch, like)

        # The compiler works outside Python, a program on each core.
        compiled = [block for block, like in zip(self.blocks, self._likes, strict=True) if not like]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda block: cost(block, None), compiled))
        each = zip(self.blocks, self._likes, strict=True)
        costs = [(block.calls, cost(block, like)) for block, like in each]
        return Cost(
            seconds=sum(calls * cost.seconds for calls, cost in costs),
            flops=sum(calls * cost.flops for calls, cost in costs),
            temporaries=max(cost.temporaries for _, cost in costs),
            kept=sum(calls * cost.kept for calls, cost in costs),
        )

    def _calls(
        self, stage: StageSettings, loss: StageLoss, batch: int, prompts: int
    ) -> dict[str, tuple[float, Cost]]:
        """Network calls of a step on a device, by what for: how many, and what each costs."""
        nfe, pairs = loss.nfe_per_pair, batch * stage.accumulate
        calls = {}
        if nfe.teacher and not stage.paths:
            both = 2 * prompts
            count = nfe.teacher * pairs / stage.epochs / both
            calls["teacher"] = (count, self.network(both))
        if nfe.rollout:
            count = nfe.rollout * pairs / stage.epochs / prompts
            calls["rollout"] = (count, self.network(prompts))
        if nfe.target:
            calls["target"] = (nfe.target * stage.accumulate, self.network(batch))
        gradient = self.network(batch, gradient=True)
        calls["student"] = (stage.accumulate, gradient)
        if nfe.aux:
            # At most: calls without a gradient of their own are counted as if they had one.
            calls["auxiliary networks"] = (nfe.aux * stage.accumulate, gradient)
        return calls

    def _merges(self, stage: StageSettings, loss: StageLoss, refill_steps: int) -> float:
        """How often a step adds the adapter to the weights."""
        nfe, full = loss.nfe_per_pair, self.settings.trainable == "full"
        targets = stage.accumulate if nfe.target else 0
        rollouts = 1 / refill_steps if nfe.rollout else 0
        # With its gradient, as large as the weights.
        student = 2 * stage.accumulate if full or self.settings.adapter.merged else 0
        return targets + rollouts + student

    def _collectives(
        self, stage: StageSettings, adapter: PyTree, base: int, calls: Mapping[str, tuple]
    ) -> dict[str, int]:
        """Bytes that a device sends in a step (rings)."""
        found = {}
        ways, devices = self.mesh.shape["fsdp"], self.topology.devices
        if devices > 1:
            whole = self._bytes(adapter, jnp.float32)
            found["gradients summed"] = int(2 * (devices - 1) / devices * whole)
        if ways > 1:
            # Forward; back, and forward again where it is recomputed.
            again = {"student": 3, "auxiliary networks": 3}
            passes = sum(count * again.get(what, 1) for what, (count, _) in calls.items())
            found["weights gathered"] = int(passes * (ways - 1) * base)
        return found

    def _bytes(self, tree: PyTree, dtype: Any = None) -> int:
        """Of a tree on one device."""
        shardings = tree_shardings(tree, self.mesh)  # type: ignore[arg-type]

        def size(leaf: Any, sharding: Any) -> int:
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return 8
            kind = np.dtype(dtype or leaf.dtype)
            return math.prod(sharding.shard_shape(leaf.shape)) * kind.itemsize

        return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))

    def _pair_bytes(self) -> int:
        """Of one pair: two or three latents, and its conditioning."""
        leaves = [*3 * [self.latents], *jax.tree.leaves(self.conditioning)]
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _one_token(model: LatentModel) -> list[jax.ShapeDtypeStruct]:
    """Token ids of one prompt, as shapes, for each text encoder."""
    return [
        jax.ShapeDtypeStruct((1, encoder.config.max_position_embeddings), jnp.int32)
        for encoder in model.text_encoders  # type: ignore[attr-defined]
    ]


def _without_files(settings: Settings) -> tuple[Settings, dict[str, list[str]]]:
    """The recipe without the terms that read weights of their own; and these, by stage."""
    stages, left_out = {}, {}
    for name, stage in settings.stages.items():
        files = [
            term
            for term, chosen in stage.terms.items()
            if hasattr(chosen, "weights") or hasattr(chosen, "scorers")
        ]
        terms = {term: chosen for term, chosen in stage.terms.items() if term not in files}
        stages[name], left_out[name] = dataclasses.replace(stage, terms=terms), files
    return dataclasses.replace(settings, stages=stages), left_out
