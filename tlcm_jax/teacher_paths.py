"""Draws the pairs of a stage once, into files, for any number of trainings.

    python -m tlcm_jax.teacher_paths --config configs/sdxl.py:segments --stage segments4 \\
        --refills 400 --output gs://BUCKET/paths/segments4

A run then reads them in place of asking the teacher: `--config.stages.segments4.paths=...`. Jobs
that know nothing of one another share the work by `--part 0/8` to `--part 7/8`. The same command
goes on where it was stopped.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags in `values`."""
    here = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config", None, "The recipe.", lock_config=False, accept_new_attributes=True, **here
    )
    flags.DEFINE_string("stage", None, "Of the recipe; its pairs do not need a student.", **here)
    flags.DEFINE_string("output", None, "The folder, on disk or gs://.", **here)
    flags.DEFINE_integer("refills", 100, "How many refills of its prompts.", 1, **here)
    flags.DEFINE_string("part", "0/1", "Which of several jobs this is.", **here)
    flags.DEFINE_string("dtype", "bfloat16", "Latents are kept in it, or in float32.", **here)
    flags.mark_flags_as_required(["config", "stage", "output"], flag_values=values)


def main(argv: list[str]) -> None:
    """Reads the flags and draws; what a user can cause is an error of one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from tlcm_jax.training import compilation, distributed

    try:
        distributed.initialize()
        compilation.use_cache()
        given = flags.FLAGS
        run(given.config.to_dict(), given.stage, given.output, refills=given.refills,
            part=given.part, dtype=given.dtype)  # fmt: skip
    except (ValueError, OSError, RuntimeError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {error}")


def run(
    config: Mapping[str, Any],
    stage: str,
    output: str,
    *,
    refills: int,
    part: str = "0/1",
    dtype: str = "bfloat16",
) -> None:
    """Draws refills `i, i + n, i + 2 n, ...` of a stage, those that are there left out.

    Args:
      config: the recipe as plain nested values.
      stage: of it.
      output: folder.
      refills: of all jobs together.
      part: "i/n".
      dtype: that latents are kept in.

    Raises:
      ValueError, FileNotFoundError: bad input; the message says what to change.
    """
    import jax

    from tlcm_jax.config import stored_pairs
    from tlcm_jax.config.build import initial_trainable, load_losses, stage_spec
    from tlcm_jax.config.inputs import read_contents
    from tlcm_jax.config.run import PromptBatches, frozen_params, load_teacher
    from tlcm_jax.config.schema import read
    from tlcm_jax.data.pair_store import PairStore
    from tlcm_jax.data.prompts import read_prompts
    from tlcm_jax.training import distributed
    from tlcm_jax.training.begin import initial
    from tlcm_jax.training.mesh import batch_sharding, make_mesh
    from tlcm_jax.training.pairs import PairStream
    from tlcm_jax.training.sharding import RULES, place

    matched = re.fullmatch(r"(\d+)/([1-9]\d*)", part)
    if not matched or int(matched[1]) >= int(matched[2]):
        raise ValueError(f"--part {part!r}: write it like 0/8, the first of eight")
    settings = read(config)
    if stage not in settings.stages:
        raise ValueError(f"--stage {stage!r}: the recipe has {', '.join(settings.stages)}")
    chosen = dataclasses.replace(settings.stages[stage], paths="", terms={})
    settings = dataclasses.replace(settings, stages={**settings.stages, stage: chosen})
    prompts, mesh = read_prompts(settings.prompts), make_mesh(settings.mesh)
    model = load_teacher(settings.model, mesh)
    model.check_teacher()
    only = dataclasses.replace(settings, stages={stage: chosen})
    loss = load_losses(only, model)[stage]
    stored_pairs.check_storable(f"--stage {stage}", only, stage, loss)
    index = list(settings.stages).index(stage)
    batches = PromptBatches(model, prompts, mesh, settings).of(stage, loss)
    spec = stage_spec(stage, chosen, loss, mesh, batches, {})
    resolution = settings.model.size
    frozen = frozen_params(model, place(model.null_conditioning(resolution), mesh))

    # The keys of the run that would draw them itself.
    adapter_key, run_key = jax.random.split(jax.random.key(settings.seed))
    trainable = initial_trainable(settings, model, adapter_key)
    state = initial(trainable, spec, run_key, index, mesh, RULES)

    def fields(pairs: Any) -> dict[str, Any]:
        kept = pairs._replace(conditioning=None, inputs=None)._asdict()
        return {name: leaf for name, leaf in kept.items() if leaf is not None}

    stream = PairStream(spec.pairs, mesh)
    draw = jax.jit(lambda *given: fields(stream.draw(*given)), out_shardings=batch_sharding(mesh))
    first = spec.pairs.batches(0)
    shapes = jax.eval_shape(draw, state.student.params, frozen, first, state.key, 0)
    described = stored_pairs.describe_pairs(settings, stage, loss)
    described["inputs"] = read_contents(settings, prompts)

    def create() -> None:
        PairStore.create(
            output,
            described,
            refills=refills,
            fields=shapes,
            chunk=spec.pairs.pairs_per_prompt,
            dtype=dtype,
        )

    distributed.lead_first(create)
    store = PairStore(output)
    done = store.done
    mine = [r for r in range(int(matched[1]), refills, int(matched[2])) if r not in done]
    logging.info("%d refills of %d pairs to draw, %d are there", len(mine), store.rows, len(done))
    for number in mine:
        made = draw(state.student.params, frozen, spec.pairs.batches(number), state.key, number)
        start, rows = distributed.local_rows(made)
        store.write(number, start, rows)
        distributed.wait_for_all(f"refill {number}")
        if jax.process_index() == 0:
            store.mark(number)
        logging.info("refill %d", number)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    define_flags(flags.FLAGS)
    app.run(main)
