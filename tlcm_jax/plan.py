"""Says what a recipe needs on hardware that is not here: memory, time, cost.

    python -m tlcm_jax.plan --config configs/sdxl.py --topology v5e:4x4 --price 1.2

The model's configs suffice, no weights are read; `pip install -e '.[plan]'` brings the TPUs'
compiler. What was compiled is kept, so a second plan takes seconds.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from tlcm_jax.config.size_flags import define_size_flags, given_size

if TYPE_CHECKING:
    from tlcm_jax.planning.buckets import Plans
    from tlcm_jax.planning.stage import StagePlan

STORE = os.path.join("~", ".cache", "tlcm_jax", "plans")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    here = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config", None, "The recipe, such as configs/sdxl.py.", lock_config=False,
        accept_new_attributes=True, **here,
    )  # fmt: skip
    flags.DEFINE_string(
        "topology", None, "What it is to run on, such as v5e:4x4.", required=True, **here
    )
    define_size_flags(values, "the recipe's")
    flags.DEFINE_float("price", 0.0, "Of a chip-hour; 0: no cost.", lower_bound=0, **here)
    flags.DEFINE_string("store", STORE, "Keeps costs; empty keeps none.", **here)
    flags.DEFINE_integer(
        "evaluate", 0, "Prompts: plans an evaluation of the student instead of the training.",
        lower_bound=0, **here,
    )  # fmt: skip
    flags.DEFINE_integer(
        "steps", 4, "With --evaluate: the student's.", lower_bound=1, upper_bound=8, **here
    )
    flags.DEFINE_integer(
        "batch_size", 25, "With --evaluate: images at a time.", lower_bound=1, **here
    )
    flags.DEFINE_bool(
        "every_block", False, "Compile every distinct block, not one of each kind: slow.", **here
    )
    flags.mark_flag_as_required("config", flag_values=values)


def main(argv: list[str]) -> None:
    """Reads the flags, prints the plan; what a user can cause is an error of one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    # Nothing runs, and a TPU's compiler must not look for a TPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        given = flags.FLAGS
        config, size = given.config.to_dict(), given_size(given)
        if size is not None:
            config["model"] = {**config.get("model", {}), "resolution": str(size), "buckets": {}}
        evaluated = (given.evaluate, given.steps, given.batch_size) if given.evaluate else None
        run(config, given.topology, given.price, given.store, given.every_block, evaluated)
    except (ValueError, OSError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {error}")


def run(
    config: dict[str, Any],
    topology: str,
    price: float = 0.0,
    store: str = "",
    every_block: bool = False,
    evaluated: tuple[int, int, int] | None = None,
) -> None:
    """Prints a recipe's plan, or that of an evaluation of its student.

    Args:
      config: as of `planner_of`, like what is not named here.
      topology: see there.
      price: of a chip-hour.
      store: see there.
      every_block: see there.
      evaluated: prompts, steps and images at a time; None plans the training.
    """
    from tlcm_jax.planning import report

    planner = planner_of(config, topology, store, every_block)
    where, settings = planner.topology, planner.settings
    sizes = " x ".join(f"{axis} {size}" for axis, size in planner.mesh.items())
    print(f"{settings.name} on {topology}: {where.chips} chips, mesh {sizes}")
    if evaluated is not None:
        print(report.describe_evaluation(planner.evaluation(*evaluated), where, price))
        print(report.describe_basis(where))
        return
    plans = [planner.plan(name) for name in settings.stages]
    for plan in plans:
        print(report.describe_stage(plan, where, settings.model.remat))
    print(report.describe_recipe(plans, where, price))
    print(report.describe_basis(where))
    print(f"planned in {time.process_time():.0f} CPU s", file=sys.stderr)


def plan_recipe(
    config: dict[str, Any], topology: str, store: str = "", every_block: bool = False
) -> tuple["Plans", list["StagePlan"]]:
    """A recipe's plan, stage by stage; args and errors are those of `planner_of`."""
    plans = planner_of(config, topology, store, every_block)
    return plans, [plans.plan(name) for name in plans.settings.stages]


def planner_of(
    config: dict[str, Any], topology: str, store: str = "", every_block: bool = False
) -> "Plans":
    """What plans a recipe.

    Args:
      config: the recipe as plain nested values.
      topology: by name.
      store: folder of what was compiled before; empty keeps none.
      every_block: compile every distinct block, not one of each kind.

    Raises:
      ValueError, FileNotFoundError: bad input; the message says what to change.
    """
    import jax.numpy as jnp

    from tlcm_jax.config.schema import read
    from tlcm_jax.families.load import abstract_model
    from tlcm_jax.planning import aot
    from tlcm_jax.planning.buckets import Plans
    from tlcm_jax.planning.cost import Compiler
    from tlcm_jax.planning.topologies import read_topology

    settings, where = read(config), read_topology(topology)
    if where.device.compiled:
        aot.devices(where.device.smallest)  # before anything slow
    dtypes = {name: jnp.dtype(getattr(settings.model, name)) for name in ("dtype", "param_dtype")}
    model = abstract_model(settings.model.path, remat=settings.model.remat, **dtypes)
    compiler = Compiler(
        device=where.device,
        dtype=dtypes["param_dtype"],
        store=Path(store).expanduser() if store else None,
        progress=lambda text: print(f"compiling {text}", file=sys.stderr, flush=True),
    )
    return Plans(settings, model, where, compiler, every_block)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    define_flags(flags.FLAGS)
    app.run(main)
