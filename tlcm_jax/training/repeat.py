"""Repeats one update of a run, operation by operation, to find where a NaN comes from."""

import dataclasses
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tlcm_jax.training.begin import initial, resume
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.positions import Position
from tlcm_jax.training.sharding import RULES, Rules
from tlcm_jax.training.stage import Stage, StageSpec

_PACKAGE = Path(__file__).parents[1]


def repeat_update(
    specs: Sequence[StageSpec],
    trainable: PyTree[Array],
    key: Array,
    total: int,
    *,
    checkpoints: Checkpoints,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> str:
    """Goes on from the newest checkpoint and does update number `total` under `jax_debug_nans`.

    Nothing is written. The update runs without compilation: every operation by itself, slowly.

    Args:
      specs: as of `loop.run`, and so are the others.
      trainable: the student's parameters, as before the first stage.
      key: of the run.
      total: the update, counted over all stages from 1.
      checkpoints: where to begin.
      mesh: of the steps.
      rules: where the state lies there.

    Returns:
      What was found, in one line.

    Raises:
      ValueError: the run does not come to that update from its newest checkpoint.
    """
    state, position = resume(specs, trainable, key, checkpoints, mesh, rules)
    if not position.total < total:
        raise ValueError(
            f"update {total} lies before the newest checkpoint, of step {position.total}: give a "
            "later one"
        )
    while True:
        spec = specs[position.stage]
        if state is None:
            state = initial(trainable, spec, key, position.stage, mesh, rules)
        stage = Stage(spec, mesh, rules)
        while position.step < spec.steps:
            pairs = stage.stream.next(position.step, state, spec.frozen)
            if position.total + 1 == total:
                with jax.disable_jit(), jax.debug_nans(True):
                    return _look(stage, state, pairs, total)
            state, _ = stage.step(state, spec.frozen, pairs)
            position = dataclasses.replace(
                position, step=position.step + 1, total=position.total + 1
            )
        if position.stage + 1 == len(specs):
            raise ValueError(f"the run has {position.total} updates, and no {total}")
        trainable, state = state.student.params, None
        following = position.stage + 1
        position = Position(following, specs[following].name, 0, position.total)


def _look(stage: Stage, state: PyTree[Array], pairs: PyTree[Array], total: int) -> str:
    try:
        _, metrics = stage.step(state, stage.spec.frozen, pairs)
    except FloatingPointError as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).is_relative_to(_PACKAGE) and frame.filename != __file__
        ]
        own = [frame for frame in frames if "/training/" not in frame.filename] or frames
        place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "(not here)"
        return f"update {total}: {str(error).splitlines()[0]} at {place}"
    values = ", ".join(f"{name} {float(metrics[name]):.6g}" for name in sorted(metrics))
    return f"update {total}: no operation gave a NaN ({values})"
