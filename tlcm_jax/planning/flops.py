"""Floating-point operations of a program, counted from its trace.

Counted are the multiplications and additions (2 x MAC) of matrix products and convolutions,
attention's two among them: what the program would run as written, nothing measured and nothing
assumed about the network. Norms, activations and softmax are left out, as is usual; they are below
1 % of a UNet's. A 3 x 3 convolution counts its padding as if it were pixels, as the usual counters
do. Where the program depends on the platform, the branch that counts most is taken: attention as
XLA writes it, since a kernel of its own does not show what it multiplies.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def count(function: Callable, *arguments: Any) -> int:
    """Operations of one call, 2 x MAC.

    Args:
      function: any JAX function; only traced.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: the program has a loop whose number of turns the trace does not tell.
    """
    return count_program(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_program(program: Any) -> int:
    """As `count`, of a traced program (a jaxpr)."""
    # Without what nobody reads, such as gradients of weights that are not trained.
    used, _ = dce_jaxpr(program, [True] * len(program.outvars))
    return _count(used)


def _count(program: Any) -> int:
    total = 0
    for equation in program.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * (kernel.size // features)
        elif name == "pallas_call":
            continue  # its body is one tile's: the branch beside it is counted
        elif name == "while":
            raise ValueError("a while loop's operations cannot be counted: it turns until it stops")
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in parameters["branches"])
        else:
            turns = parameters["length"] if name == "scan" else 1
            total += turns * sum(_count(inner) for inner in _inner_programs(parameters))
    return total


def _inner_programs(parameters: dict[str, Any]) -> list[Any]:
    """The programs that an equation calls: of jit, remat, scan and custom derivatives."""
    found = []
    for value in parameters.values():
        if hasattr(value, "jaxpr"):
            found.append(value.jaxpr)
        elif hasattr(value, "eqns"):
            found.append(value)
    return found
