"""Counts a network's floating-point operations and parameters from its config, without weights.

    python -m benchmarks.flops --config unet/config.json --resolution 1024

What is counted: `tlcm_jax/planning/flops.py`.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from tlcm_jax.families.base import abstract_params
from tlcm_jax.models.unet import UNet2DConditionModel
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.planning.flops import count


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
