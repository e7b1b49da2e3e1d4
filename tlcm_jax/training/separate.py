"""A step as several programs: one that produces, one that updates the student, one each player.

What they compute is what the fused step computes (`step.py`); each update is a call from the host
instead of a turn of a scan.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tlcm_jax.training.players import Player, Shown, parameters, summed_up
from tlcm_jax.training.state import TrainState

PyTree = Any
Metrics = dict[str, Array]


def separate(
    prepare: Callable,
    look: Callable,
    update: Callable,
    train: Mapping[str, Callable],
    players: Mapping[str, Player],
    summary: Callable[[Metrics, PyTree], Metrics],
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Metrics]]:
    """The step, compiled in parts.

    Args:
      prepare: `(state, frozen, batch) -> (examples [updates, accumulate, m, ...], keys)`.
      look: `(trainable, frozen, examples, keys) -> Shown`; not called without players.
      update: the student's, as `update.student_update` makes it.
      train: each player's, as `update.player_update` makes them.
      players: who else is trained, by name.
      summary: `(metrics [updates], examples) -> metrics` of the step.

    Returns:
      `(state, frozen, batch) -> (state, metrics)`; the state is donated.
    """
    prepare = jax.jit(prepare)

    @partial(jax.jit, donate_argnums=0)
    def one(carry: tuple, frozen: PyTree, examples: PyTree, keys: Array, index: Array) -> tuple:
        return update(carry, frozen, *_at((examples, keys), index))

    @jax.jit
    def shown_at(
        trainable: PyTree, frozen: PyTree, examples: PyTree, keys: Array, index: Array
    ) -> Shown:
        return look(trainable, frozen, *_at((examples, keys), index))

    @partial(jax.jit, donate_argnums=0)
    def one_seeing(
        carry: tuple, frozen: PyTree, examples: PyTree, keys: Array, index: Array, others: PyTree
    ) -> tuple:
        return update(carry, frozen, _at(examples, index), keys, parameters(others))

    def make_turn(name: str) -> Callable:
        @partial(jax.jit, donate_argnums=0)
        def turn(carry: tuple, frozen: PyTree, shown: Shown, index: Array) -> tuple:
            return train[name](carry, frozen, *_at(shown.of(name, players[name]), index))

        return turn

    turns = {name: make_turn(name) for name in players}

    @jax.jit
    def finish(step: Array, examples: PyTree, collected: list) -> tuple[Array, Metrics]:
        if players:
            collected = [
                {**mine, **summed_up({name: _stack(turns) for name, turns in told.items()})}
                for mine, told in collected
            ]
        return step + 1, summary(_stack(collected), examples)

    def run(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        examples, keys = prepare(state, frozen, batch)
        carry, collected = state.student, []
        others = dict(state.players)
        for index in range(len(keys)):
            if not players:
                carry, metrics = one(carry, frozen, examples, keys, index)
                collected.append(metrics)
                continue
            shown = shown_at(carry[0], frozen, examples, keys, index)
            told: dict[str, list] = {name: [] for name in players}
            for name, player in players.items():
                for turn in range(player.updates):
                    others[name], metrics = turns[name](others[name], frozen, shown, turn)
                    told[name].append(metrics)
            carry, metrics = one_seeing(carry, frozen, examples, shown.keys, index, others)
            collected.append((metrics, told))
        step, told_in_all = finish(state.step, examples, collected)
        return dataclasses.replace(state.moved(carry), step=step, players=others), told_in_all

    return run


def _at(tree: PyTree, index: Array) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def _stack(metrics: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)
