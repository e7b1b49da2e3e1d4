"""Players beside the student: networks that are trained on what it makes, and judge it.

With theta the student's leaves, phi_c those of player c and R_c its updates a student's update,

  shown_r = show(theta)(examples, K_r),   r = 1 .. max R_c, without gradients            (1)
  phi_c <- phi_c + optimiser_c(grad loss_c(phi_c, frozen, shown_r)),   r = 1 .. R_c      (2)

and then the student's own update, whose loss sees all phi_c. What the student makes is made once
for all of them. A player's loss has the form of any objective's, so (2) is the student's own
update rule (`step.py`, equations 2 and 3).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

if TYPE_CHECKING:
    from tlcm_jax.distillation.objective import Objective

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Player:
    """One that is trained beside the student.

    Attributes:
      initial: `(key) -> params`, as before the stage's first step.
      loss: `(params, frozen, shown, key) -> (per_sample [n], metrics)`.
      optimizer: its optax transformation, clipping included.
      updates: R_c, before each update of the student.
    """

    initial: Callable[[Array], PyTree]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    optimizer: optax.GradientTransformation
    updates: int

    def __post_init__(self) -> None:
        """Refuses a player who never moves."""
        if self.updates < 1:
            raise ValueError(f"a player's updates must be at least 1, got {self.updates}")


@flax.struct.dataclass
class Shown:
    """What the players are shown before one update of the student.

    Attributes:
      examples: pytree `[rounds, accumulate, m, ...]`, rounds the largest R_c.
      player_keys: by player, a key for each of its losses, `[rounds, accumulate]`.
      keys: the student's, `[accumulate]`.
    """

    examples: PyTree
    player_keys: dict[str, Array]
    keys: Array

    def of(self, name: str, player: Player) -> tuple[PyTree, Array]:
        """A player's own share: examples `[R_c, accumulate, m, ...]`, and keys."""
        everything = (self.examples, self.player_keys[name])
        return jax.tree.map(lambda x: x[: player.updates], everything)


def show(
    objective: "Objective",
    players: Mapping[str, Player],
    trainable: PyTree,
    frozen: PyTree,
    examples: PyTree,
    keys: Array,
) -> Shown:
    """Equation (1).

    Args:
      objective: `show(trainable, frozen)` prepares the student once and returns
        `(examples, key) -> shown`, the two sides of one micro-batch.
      players: who will look.
      trainable: theta.
      frozen: what is not trained.
      examples: those of one student's update, `[accumulate, m, ...]`.
      keys: a key for each micro-batch, `[accumulate]`; split between the student and the rest.
    """
    rounds, pieces = max(player.updates for player in players.values()), keys.shape[0]
    mine, theirs = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    per_piece = jax.vmap(lambda key: jax.random.split(key, (rounds, 1 + len(players))))(theirs)
    grid = jnp.moveaxis(per_piece, 0, 1)  # [rounds, accumulate, 1 + players]
    if objective.show is None:
        raise ValueError(f"players {sorted(players)} are shown nothing: the objective lacks `show`")
    made = objective.show(jax.lax.stop_gradient(trainable), frozen)

    def one(place: tuple[Array, Array]) -> PyTree:
        piece, key = place
        return made(jax.tree.map(lambda x: x[piece], examples), key)

    piece = jnp.tile(jnp.arange(pieces), rounds)
    shown = jax.lax.map(one, (piece, grid[:, :, 0].reshape(-1)))
    shown = jax.tree.map(lambda x: x.reshape(rounds, pieces, *x.shape[1:]), shown)
    player_keys = {name: grid[:, :, 1 + i] for i, name in enumerate(sorted(players))}
    return Shown(jax.lax.stop_gradient(shown), player_keys, mine)


def parameters(others: Mapping[str, tuple[PyTree, PyTree]]) -> dict[str, PyTree]:
    """The players' parameters by name, out of the state's (parameters, optax state)."""
    return {name: pair[0] for name, pair in others.items()}


def take_turns(
    players: Mapping[str, Player],
    train: Mapping[str, Callable],
    others: Mapping[str, tuple[PyTree, PyTree]],
    frozen: PyTree,
    shown: Shown,
) -> tuple[dict[str, tuple[PyTree, PyTree]], dict[str, Array]]:
    """Equation (2) for every player, as a scan over its updates.

    Args:
      players: who they are.
      train: of each, `(state, frozen, examples, keys, loop) -> (state, metrics)`, one update.
      others: of each, its parameters and optax state.
      frozen: what is not trained.
      shown: what they are shown.

    Returns:
      Their new parameters and optax states, and what they report, by `NAME/...`.
    """
    trained: dict[str, tuple[PyTree, PyTree]] = {}
    told: dict[str, dict[str, Array]] = {}
    for name, player in players.items():

        def turn(state: tuple, xs: tuple, update: Callable = train[name]) -> tuple:
            return update(state, frozen, *xs, loop=True)

        trained[name], told[name] = jax.lax.scan(turn, others[name], shown.of(name, player))
    return trained, summed_up(told)


def summed_up(told: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """What players report of one round, `[updates]` each, as means by `NAME/...`."""
    return {
        f"{name}/{key}": jnp.mean(value)
        for name, reported in told.items()
        for key, value in reported.items()
    }
