"""What the roles of TLCM's last stage hold in memory, on one frozen base and on a UNet each.

    python -m benchmarks.memory --model stable-diffusion-xl-base-1.0

MODEL is a pipeline folder; its configs are enough, and nothing is allocated. The last stage has
five roles: teacher (and real score), student, target, fake score, discriminator. In the first
column all are one frozen base under adapters, with Adam's moments where they learn, as here. In the
second each role has a base of its own under the same adapters; in the third those that learn are
whole networks: fp32 weights and two moments. Activations are not counted.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from configs import sdxl
from tlcm_jax.config.build import abstract_adapter, blueprints
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.training.mesh import make_mesh
from tlcm_jax.training.state import create


def size(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def roles(model: Path) -> Mapping[str, tuple[int, int, int]]:
    """Bytes of each role, by column."""
    config = sdxl.get_config("paper").to_dict()
    last = config["stages"]["endpoints"]
    last["terms"] = {"distribution_matching": {}, "adversarial": {}}
    config |= {"stages": {"endpoints": last}, "stage_order": ("endpoints",)}
    settings = read(config)
    pipeline = abstract_model(
        model, dtype=settings.model.dtype, param_dtype=settings.model.param_dtype
    )
    (plan,) = blueprints(settings, pipeline, make_mesh(settings.mesh))
    stage = plan.stage(lambda step: None)
    unet = pipeline.params["unet"]
    adapter = abstract_adapter(settings, unet)
    state = jax.eval_shape(
        lambda theta: create(theta, stage.optimizer, jax.random.key(0), stage.players), adapter
    )
    whole = size(unet)
    trained = 3 * 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unet))
    learning = {"student": size((state.trainable, state.opt_state))}
    learning |= {name: size(player) for name, player in state.players.items()}
    return {
        "teacher, real score": (whole, whole, whole),
        "target": (0, whole, whole),
        **{name: (held, whole + held, trained) for name, held in learning.items()},
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    found = roles(parser.parse_args().model)
    total = tuple(sum(held) for held in zip(*found.values(), strict=True))
    print(f"{'GB':20} {'one base':>12} {'a base each':>12} {'whole':>12}")
    for name, columns in [*found.items(), ("all", total)]:
        print(f"{name:20} " + " ".join(f"{held / 1e9:12.2f}" for held in columns))


if __name__ == "__main__":
    main()
