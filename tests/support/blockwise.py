"""Runs a network block by block, so that tests of many alike networks share compiled code.

Compiling a small UNet whole takes longer than everything else in its test, and the next family's
is another program. Its residual blocks and transformers are the same few programs over and over.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

from tlcm_jax.models.resnet import ResnetBlock2D
from tlcm_jax.models.transformer import Transformer2DModel


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: nn.Module, variables: Any, arguments: tuple) -> Any:
    return module.apply(variables, *arguments)


def _compile_blocks(call: Any, arguments: tuple, keywords: dict, context: Any) -> Any:
    module = context.module
    blocks = isinstance(module, ResnetBlock2D | Transformer2DModel)
    # The block that `_apply` compiles comes by here again, without a parent, and runs itself.
    nested = isinstance(module.parent, nn.Module)
    if not (blocks and nested) or context.method_name != "__call__":
        return call(*arguments, **keywords)
    return _apply(module.clone(parent=None, name=None), module.variables, arguments)


@contextlib.contextmanager
def blockwise() -> Iterator[None]:
    """Within, `apply` compiles each residual block and transformer on its own."""
    with nn.intercept_methods(_compile_blocks):
        yield
