"""The programs of a block, forward and gradient, and what their traces tell without a compiler."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tlcm_jax.models import lora
from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.models.transformer import rematerialized
from tlcm_jax.planning.blocks import Block
from tlcm_jax.planning.flops import count_program


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A program of a block.

    Attributes:
      block: whose.
      what: of the block it is.
      run: what is compiled.
      shapes: its arguments.
      counted: the same without rematerialisation.
      count_kept: counts the bytes that the forward pass leaves to a backward pass.
    """

    block: Block
    what: str
    run: Callable
    shapes: tuple
    counted: Callable
    count_kept: Callable[[], int] = lambda: 0

    @functools.cached_property
    def _traced(self) -> tuple[int, int]:
        traced = jax.make_jaxpr(self.counted)(*self.shapes)
        return count_program(traced.jaxpr), size(self.shapes) + size(traced.out_avals)

    @property
    def flops(self) -> int:
        """Operations, without what rematerialisation does again."""
        return self._traced[0]

    @property
    def moved(self) -> int:
        """Bytes of arguments and results: what crosses the memory at least."""
        return self._traced[1]

    @functools.cached_property
    def kept(self) -> int:
        """Bytes that the forward pass leaves to the backward pass, at most."""
        return self.count_kept()

    @property
    def batch(self) -> int:
        """Samples."""
        return self.shapes[-1].shape[0]


@functools.lru_cache(maxsize=1024)
def forward(block: Block, batch: int, dtype: Any) -> Program:
    """A call without gradients, weights in `dtype`."""
    inputs = _batched(block, batch)

    def call(params: PyTree, *x: Any) -> Any:
        return block.apply({"params": params}, *x)

    shapes = (_params(block, inputs, dtype), *inputs)
    return Program(block=block, what="forward", run=call, shapes=shapes, counted=call)


@functools.lru_cache(maxsize=1024)
def gradient(block: Block, batch: int, dtype: Any, adapter: LoRAConfig | None) -> Program:
    """A call, and the gradients of its inputs and of an adapter's factors (None: of its weights).

    As in a whole network, every input has a gradient.
    """
    inputs = _batched(block, batch)
    params = _params(block, inputs, dtype)
    factors = params if adapter is None else _factors(block, params, adapter)

    def call(factors: PyTree, *x: Any, params: PyTree) -> Any:
        if adapter is None:
            return block.apply({"params": factors}, *x)
        if adapter.merged:
            return block.apply({"params": lora.merge(params, factors)}, *x)
        return block.apply({"params": params, "lora": factors}, *x)

    def both(remat: str, params: PyTree, factors: PyTree, cotangent: Any, *x: Any) -> Any:
        bound = functools.partial(call, params=params)
        out, pull = jax.vjp(rematerialized(bound, remat), factors, *x)
        return out, pull(cotangent)

    out = jax.eval_shape(
        lambda params, *given: call(*given, params=params), params, factors, *inputs
    )

    return Program(
        block=block,
        what=f"gradient {adapter}",
        run=functools.partial(both, block.remat),
        shapes=(params, factors, out, *inputs),
        counted=functools.partial(both, "none"),
        count_kept=lambda: _residuals(call, block.remat, params, factors, inputs),
    )


def size(tree: PyTree) -> int:
    """Bytes of a tree's leaves, arrays or shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _batched(block: Block, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in block.inputs)


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


def _residuals(call: Callable, remat: str, params: PyTree, factors: PyTree, inputs: Any) -> int:
    """Bytes that the trace of a forward pass hands to its backward pass.

    Without weights, and without inputs after the first, which all blocks share.
    """

    def forward(params: PyTree, factors: PyTree, *x: Any) -> Any:
        bound = rematerialized(functools.partial(call, params=params), remat)
        return jax.vjp(bound, factors, *x)[1]

    traced = jax.make_jaxpr(forward)(params, factors, *inputs).jaxpr
    first = traced.invars[-len(inputs)]
    given = {id(var) for var in traced.invars if var is not first}
    kept = {id(v): v.aval for v in traced.outvars if hasattr(v, "aval") and id(v) not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())
