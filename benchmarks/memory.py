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
from tlcm_jax.config.build import initial_trainable, load_losses, stage_spec
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.training.mesh import make_mesh


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
    teacher = abstract_model(
        model, dtype=settings.model.dtype, param_dtype=settings.model.param_dtype
    )
    loss = load_losses(settings, teacher)["endpoints"]
    mesh = make_mesh(settings.mesh)
    stage = stage_spec("endpoints", settings.stages["endpoints"], loss, mesh, lambda r: None, {})
    adapter = jax.eval_shape(lambda: initial_trainable(settings, teacher, jax.random.key(0)))
    state = jax.eval_shape(lambda theta: stage.create_state(theta, jax.random.key(0)), adapter)
    base = teacher.params[teacher.backbone]
    whole = size(base)
    trained = 3 * 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(base))
    learning = {name: size(network) for name, network in state.networks.items()}
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
