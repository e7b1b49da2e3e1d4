"""Counts a network's floating-point operations and parameters from its config, without weights.

    python -m benchmarks.flops --config unet/config.json --resolution 1024

Counted are the multiplications and additions (2 x MAC) of matrix products and convolutions,
attention's two among them, in the traced program of one forward pass: what it would run as
written, nothing measured and nothing assumed about the network. Norms, activations and softmax
are left out, as is usual; they are below 1 % of a UNet's. A 3 x 3 convolution counts its padding
as if it were pixels, as the usual counters do.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tlcm_jax.families.base import abstract_params
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig


def count(function: Callable, *arguments: Any) -> int:
    """Operations of one call, 2 x MAC.

    Args:
      function: any JAX function; only traced.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: the program has a loop whose number of turns the trace does not tell.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


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


def unet_forward(config: UNetConfig, resolution: int, batch: int = 1, tokens: int = 77) -> int:
    """Operations of a UNet's forward pass.

    Args:
      config: the architecture.
      resolution: side of the pictures in pixels; latents are an eighth of it.
      batch: pictures.
      tokens: of text.
    """
    net = UNet2DConditionModel(config)
    variables = {"params": abstract_params(net)}

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *sizes), jnp.float32)

    side, embedded = resolution // 8, 6 * config.addition_time_embed_dim
    inputs = {
        "sample": shape(side, side, config.in_channels),
        "timesteps": shape(),
        "encoder_hidden_states": shape(tokens, config.cross_attention_dim),
    }
    if config.text_time:
        pooled = config.projection_class_embeddings_input_dim - embedded
        inputs |= {"text_embeds": shape(pooled), "time_ids": shape(6)}
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = shape(config.time_cond_proj_dim)
    return count(lambda variables, inputs: net.apply(variables, **inputs), variables, inputs)


def main() -> None:
    """Prints operations and parameters of the UNet that a config describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a UNet's config.json")
    parser.add_argument("--resolution", type=int, default=1024, help="in pixels")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    config = UNetConfig.from_dict(json.loads(args.config.read_text(encoding="utf-8")))
    tree = abstract_params(UNet2DConditionModel(config))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tree))
    operations = unet_forward(config, args.resolution, args.batch)
    print(
        f"{operations / 1e12:.3f} TFLOP a forward pass of {args.batch} at {args.resolution} px; "
        f"{parameters} parameters"
    )


if __name__ == "__main__":
    main()
