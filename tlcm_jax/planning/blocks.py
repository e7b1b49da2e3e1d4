"""The distinct blocks of a network: what to compile once and multiply.

A UNet calls few kinds of block on few shapes. They are found by tracing one forward pass and noting
each block's module and inputs; what lies between them (joining skips, adding embeddings) is left
out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tlcm_jax.models.embeddings import TimestepEmbedding
from tlcm_jax.models.layers import Conv, Dense
from tlcm_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from tlcm_jax.models.transformer import BasicTransformerBlock

# Outermost first: what is called inside one of these is part of it. A stack of transformer blocks
# is its blocks, and the layers before and after them.
_BLOCKS = (
    BasicTransformerBlock, ResnetBlock2D, Downsample2D, Upsample2D, TimestepEmbedding, Conv, Dense,
    nn.GroupNorm,
)  # fmt: skip
# What each policy of the network recomputes.
_RECOMPUTED: dict[str, tuple[type, ...]] = {
    "none": (),
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
      remat: whether the network's policy recomputes it in the backward pass.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    calls: int
    remat: bool

    @property
    def kind(self) -> str:
        """Its class, and its first input's shape."""
        shape = "x".join(map(str, self.inputs[0].shape))
        return f"{type(self.module).__name__} {shape}"

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
        again = isinstance(module, _RECOMPUTED[remat])
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
