"""What a block costs on one device: compiled for it or, where nothing compiles, by roofline."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tlcm_jax.models import lora
from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.planning import kernels
from tlcm_jax.planning.aot import single_device
from tlcm_jax.planning.blocks import Block
from tlcm_jax.planning.cycles import read_program
from tlcm_jax.planning.flops import count
from tlcm_jax.planning.topologies import Device

# Both are needed, and then convolutions of small batches keep their shape (docs/scale.md).
NO_SPACE_TO_BATCH = {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One call of a program on one device.

    Attributes:
      seconds: modelled.
      flops: counted from its trace, without what rematerialisation does again.
      temporaries: bytes beside arguments and results.
      kept: of a gradient: bytes that the forward pass keeps for the backward pass, at most.
      compile_seconds: of the CPU; 0 from the store.
    """

    seconds: float
    flops: int
    temporaries: int
    kept: int = 0
    compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """Costs of blocks, each compiled once and kept in a folder for the next time.

    Attributes:
      device: what for.
      dtype: of weights that are not trained.
      options: the compiler's.
      store: folder of costs; None keeps none.
      progress: told what is compiled.
    """

    device: Device
    dtype: Any = jnp.bfloat16
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    store: Path | None = None
    progress: Callable[[str], None] = lambda text: None

    def forward(self, block: Block, batch: int) -> Cost:
        """One call without gradients."""
        inputs = _batched(block, batch)
        params = _params(block, inputs, self.dtype)
        return self._cost(
            block,
            "forward",
            lambda params, *x: block.apply({"params": params}, *x),
            params,
            *inputs,
        )

    def gradient(self, block: Block, batch: int, adapter: LoRAConfig | None) -> Cost:
        """A call, and the gradients of its inputs and of an adapter beside its weights.

        Args:
          block: the block.
          batch: samples.
          adapter: whose factors are trained; None trains the weights themselves.
        """
        inputs = _batched(block, batch)
        params = _params(block, inputs, self.dtype)
        factors = params if adapter is None else _factors(block, params, adapter)

        def call(factors: PyTree, *x: Any, params: PyTree) -> Any:
            if adapter is None:
                return block.apply({"params": factors}, *x)
            if adapter.merged:
                return block.apply({"params": lora.merge(params, factors)}, *x)
            return block.apply({"params": params, "lora": factors}, *x)

        def both(remat: bool, params: PyTree, factors: PyTree, cotangent: Any, *x: Any) -> Any:
            bound = functools.partial(call, params=params)
            out, pull = jax.vjp(jax.checkpoint(bound) if remat else bound, factors, *x)
            return out, pull(cotangent)

        out = jax.eval_shape(
            lambda params, *given: call(*given, params=params), params, factors, *inputs
        )
        arguments = (params, factors, out, *inputs)
        cost = self._cost(
            block,
            f"gradient {adapter}",
            functools.partial(both, block.remat),
            *arguments,
            counted=functools.partial(both, False),
        )
        if block.remat:
            kept = _size(inputs[:1])
        else:
            kept = min(_residuals(call, params, factors, inputs), cost.temporaries or 2**62)
        return dataclasses.replace(cost, kept=kept)

    def _cost(
        self, block: Block, what: str, program: Callable, *shapes: Any, counted: Any = None
    ) -> Cost:
        label = f"{block.kind}, batch {block_batch(shapes)}: {what}"
        stored = None
        if self.store is not None:
            stored = self.store / f"{self._key(block, what, shapes)}.json"
            if stored.is_file():
                return Cost(**json.loads(stored.read_text(encoding="utf-8")))
        self.progress(label)
        flops = count(counted or program, *shapes)
        if self.device.compiled:
            cost = self._compile(program, flops, *shapes)
        else:
            cost = self._roofline(program, flops, *shapes)
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            kept = dataclasses.asdict(dataclasses.replace(cost, compile_seconds=0.0))
            stored.write_text(json.dumps(kept), encoding="utf-8")
        return cost

    def _key(self, block: Block, what: str, shapes: Any) -> str:
        """All that a cost depends on, this program's own lines through its text."""
        said = [self.device, str(self.dtype), self.options, block.module, block.remat, what]
        said += [jax.tree.map(lambda x: (x.shape, str(x.dtype)), shapes), _versions()]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:32]

    def _compile(self, program: Callable, flops: int, *shapes: Any) -> Cost:
        started = time.process_time()
        place = single_device(self.device.smallest)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        compiled = jax.jit(program).lower(*placed).compile(compiler_options=self.options)
        reading, used = read_program(compiled.as_text() or ""), compiled.memory_analysis()
        seconds = reading.cycles / self.device.clock
        seconds += sum(kernels.seconds(kernel, self.device) for kernel in reading.kernels)
        return Cost(
            seconds=seconds,
            flops=flops,
            temporaries=0 if used is None else used.temp_size_in_bytes,
            compile_seconds=time.process_time() - started,
        )

    def _roofline(self, program: Callable, flops: int, *shapes: Any) -> Cost:
        """At the peak, or at the rate that weights, inputs and results cross the memory."""
        moved = _size(shapes) + _size(jax.eval_shape(program, *shapes))
        seconds = max(flops / self.device.peak, moved / self.device.bandwidth)
        return Cost(seconds=seconds, flops=flops, temporaries=0)


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of the compilers, of this package's networks, and of what reads the programs."""
    root = Path(__file__).parents[1]
    readers = [root / "planning" / f"{name}.py" for name in ("cost", "cycles", "kernels")]
    files = sorted([*(root / "models").glob("*.py"), *readers])
    text = b"".join(file.read_bytes() for file in files)
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = ""
    return jax.__version__, libtpu, hashlib.sha256(text).hexdigest()


def block_batch(shapes: Any) -> int:
    """The leading axis of a program's last argument."""
    return jax.tree.leaves(shapes)[-1].shape[0]


def _batched(block: Block, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in block.inputs)


@functools.lru_cache(maxsize=256)
def _params(block: Block, inputs: Any, dtype: Any) -> PyTree:
    shapes = jax.eval_shape(block.module.init, jax.random.key(0), *inputs).get("params", {})
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(dtype)), shapes)


def _factors(block: Block, params: PyTree, adapter: LoRAConfig) -> PyTree:
    """The adapter of the block's layers, by their names in the whole network; as shapes."""
    path = tuple(block.name.split("/"))
    factors: dict[tuple[str, ...], Any] = {}
    for name, leaf in flax.traverse_util.flatten_dict(params).items():
        if name[-1] != "kernel" or not lora.targeted((*path, *name[:-1]), adapter.targets):
            continue
        *spatial, fan, out = leaf.shape
        ones = (1,) * len(spatial)
        for part, shape in (
            ("lora_A", (*spatial, fan, adapter.rank)),
            ("lora_B", (*ones, adapter.rank, out)),
        ):
            factors[(*name[:-1], part)] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flax.traverse_util.unflatten_dict(factors)


def _residuals(call: Callable, params: PyTree, factors: PyTree, inputs: Any) -> int:
    """Bytes that the trace of a forward pass hands to its backward pass, weights apart."""

    def forward(params: PyTree, factors: PyTree, *x: Any) -> Any:
        return jax.vjp(functools.partial(call, params=params), factors, *x)[1]

    traced = jax.make_jaxpr(forward)(params, factors, *inputs).jaxpr
    given = {id(var) for var in traced.invars[: -len(inputs)]}
    kept = {id(v): v.aval for v in traced.outvars if hasattr(v, "aval") and id(v) not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())


def _size(tree: PyTree) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
