"""The distinct blocks of a network: what to compile once and multiply.

A UNet calls few kinds of block on few shapes. They are found by tracing one forward pass and noting
each block's module and inputs; what lies between them (joining skips, adding embeddings) is left
out.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tlcm_jax.models.embeddings import TimestepEmbedding
from tlcm_jax.models.layers import Conv, Dense, GroupNorm
from tlcm_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from tlcm_jax.models.transformer import Attention, BasicTransformerBlock

# Outermost first: what is called inside one of these is part of it. A stack of transformer blocks
# is its blocks, and the layers before and after them.
_BLOCKS = (
    BasicTransformerBlock, Attention, ResnetBlock2D, Downsample2D, Upsample2D, TimestepEmbedding,
    Conv, Dense, GroupNorm, nn.GroupNorm,
)  # fmt: skip
# What each policy of the network recomputes.
_RECOMPUTED: dict[str, tuple[type, ...]] = {
    "none": (),
    "attention": (BasicTransformerBlock,),
    "blocks": (BasicTransformerBlock,),
    "all": (BasicTransformerBlock, ResnetBlock2D),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One distinct block.

    Attributes:
      name: of its first call, joined with '/'.
      module: unbound, to be applied to parameters of its own.
      inputs: shapes of the arrays it is called with.
      calls: how often the network calls it.
      remat: what its backward pass recomputes (`models.transformer.rematerialized`).
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    calls: int
    remat: str

    @property
    def kind(self) -> str:
        """Its class, and its first input's shape."""
        shape = "x".join(map(str, self.inputs[0].shape))
        return f"{type(self.module).__name__} {shape}"

    @property
    def places(self) -> int:
        """Pixels or tokens of its first input."""
        return math.prod(self.inputs[0].shape[1:-1])

    def apply(self, variables: Any, *arrays: Any) -> Any:
        """The block on arrays in the places of `inputs`."""
        return self.module.apply(variables, *arrays)


def distinct_blocks(apply: Callable, *arguments: Any, remat: str = "none") -> list[Block]:
    """The distinct blocks of one call of a network, in the order of their first calls.

    Args:
      apply: traceable; it calls the network's modules.
      *arguments: of `apply`: arrays or shapes.
      remat: the network's rematerialisation policy.
    """
    found: dict[Any, Block] = {}
    inside: list[nn.Module] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes = tuple(jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in inputs)
        clone = module.clone(parent=None, name=None)
        key = (clone, tuple((x.shape, str(x.dtype)) for x in shapes))
        if key in found:
            found[key] = dataclasses.replace(found[key], calls=found[key].calls + 1)
            return
        again = remat if isinstance(module, _RECOMPUTED[remat]) else "none"
        name = "/".join(module.path)
        found[key] = Block(name=name, module=clone, inputs=shapes, calls=1, remat=again)

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or inside or not isinstance(module, _BLOCKS):
            return call(*args, **kwargs)
        # A size, where one is given, is what the input's own shape gives too.
        note(module, tuple(x for x in args if hasattr(x, "dtype")))
        inside.append(module)
        try:
            return call(*args, **kwargs)
        finally:
            inside.pop()

    with nn.intercept_methods(intercept):
        jax.eval_shape(apply, *arguments)
    return list(found.values())


def representatives(
    blocks: Sequence[Block], seconds: Callable[[Block], float], least: float = 0.05
) -> list[Block]:
    """For each block, the one of its kind that is compiled in its place.

    Of a kind are blocks of one class and as many places; where these take little of the whole
    time, of one class alone. The one that takes most of it stands for the others.

    Args:
      blocks: of a network.
      seconds: about what a call takes.
      least: the part of the network's time from which on a class's places are told apart.
    """
    time = [block.calls * seconds(block) for block in blocks]
    kinds: list[tuple] = [(type(block.module), block.places) for block in blocks]
    for kind in set(kinds):
        members = [i for i, each in enumerate(kinds) if each == kind]
        if sum(time[i] for i in members) < least * sum(time):
            for i in members:
                kinds[i] = kind[:1]
    return [
        blocks[max((i for i, each in enumerate(kinds) if each == kind), key=time.__getitem__)]
        for kind in kinds
    ]
