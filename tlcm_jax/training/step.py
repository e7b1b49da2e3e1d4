"""One training step of any stage: produce examples, then optimise on them.

A step draws its examples from an objective's gradient-free `produce`, once,

  examples = produce(theta, frozen, batch, K),                                           (1)

with theta the trainable leaves and K of fold_in(key, step); shuffles them (examples of one
teacher path must not meet in one update); and makes `updates` optimiser updates (`update.py`),
each on the mean gradient of `accumulate` micro-batches. With `epochs` it goes through the same
examples again, in another order and with fresh keys. The engine knows no loss by name.

In a game, other players (`players.py`) are trained beside the student. Before each of its updates
they are shown what it makes of that update's examples, and each takes updates of its own; the
student's loss then sees their parameters, and has no gradient in them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tlcm_jax.training.mesh import AXES, check_batch, replicated
from tlcm_jax.training.players import Player, parameters, show, take_turns
from tlcm_jax.training.separate import separate
from tlcm_jax.training.sharding import RULES, Rules
from tlcm_jax.training.state import TrainState
from tlcm_jax.training.update import player_update, student_update

if TYPE_CHECKING:
    from tlcm_jax.distillation.objective import Objective

PyTree = Any
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step spends the examples it produced.

    Attributes:
      updates: optimiser updates an epoch.
      accumulate: micro-batches an update; raises the batch of an update without its memory.
      epochs: how often the step goes through its examples, which it then holds so many times.
      ema_decay: d of the average that is kept of the student (`update.py`, equation 3); 0 keeps
        none.
      fused: whether the step is one compiled program, with scans over the updates and
        micro-batches, or one program that produces and one that updates, called `updates` times
        (and one for each other player). None: fused except on CPU, where XLA brings a
        convolution's gradients to its fast form only outside loops (measured: inside a scan they
        ran 25 times slower). The results agree to rounding.
    """

    updates: int = 1
    accumulate: int = 1
    epochs: int = 1
    ema_decay: float = 0.0
    fused: bool | None = None

    def __post_init__(self) -> None:
        """Refuses counts below one, and an average that forgets nothing or everything."""
        for name in ("updates", "accumulate", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in 0 (none) to below 1, got {self.ema_decay}")


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step: `state, metrics = step(state, frozen, batch)`.

    The state is donated: use the returned one. Nothing waits for the device.

    Attributes:
      whole: the step as one jitted program; what ahead-of-time compilation looks at.
      run: what a call runs: `whole`, or the same in several programs.
    """

    whole: Any
    run: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Metrics]]

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: PyTree
    ) -> tuple[TrainState, Metrics]:
        """Runs the step; see `make_step`."""
        return self.run(state, frozen, batch)

    def lower(self, state: PyTree, frozen: PyTree, batch: PyTree) -> Any:
        """Lowers the step as one program, from arrays or `jax.ShapeDtypeStruct`s."""
        return self.whole.lower(state, frozen, batch)


def make_step(
    objective: "Objective",
    optimizer: optax.GradientTransformation,
    settings: StepSettings | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    players: Mapping[str, Player] | None = None,
) -> Step:
    """Builds the step of a stage.

    Args:
      objective: `produce(trainable, frozen, batch, key) -> examples [n, ...]` and
        `loss(trainable, frozen, examples, key) -> (per_sample [n], metrics)`.
      optimizer: an optax transformation, clipping included.
      settings: how a step spends its examples.
      mesh: the mesh that the arguments lie on; None for one device.
      rules: where the state lies; as given to `sharding.tree_shardings`.
      players: who else is trained, by name. Then `objective.show` says what they are shown
        (`players.show`), and the loss gets one more argument, their parameters by name. An
        average of the student is among them, as `update.AVERAGE`, where one is kept.

    Returns:
      A `Step`. Its metrics are float32 scalars on the device: `loss` and the objective's own,
      averaged over the step; `grad_norm` and `grad_norm_max`, mean and largest over the updates,
      before clipping; `NAME/loss` and so on of each other player; `examples`, how many were
      made; and `finite`, a bool, whether every loss and gradient norm was.

    Raises:
      ValueError: (when first called, before anything is compiled) examples that the updates,
        micro-batches or devices cannot divide; a loss that is not one value a sample; a metric
        with one of the step's own names.
    """
    settings = settings or StepSettings()
    fused = jax.default_backend() != "cpu" if settings.fused is None else settings.fused
    players = players or {}
    update = student_update(objective.loss, optimizer, mesh, rules, settings.ema_decay)
    train = {
        name: player_update(name, player.loss, player.optimizer, mesh, rules)
        for name, player in players.items()
    }
    prepare = partial(_prepare, objective, settings, mesh)
    look = partial(show, objective, players)
    summary = partial(_summary, mesh, settings.epochs)

    def whole(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        examples, keys = prepare(state, frozen, batch)

        def body(carry: tuple, xs: tuple) -> tuple[tuple, Metrics]:
            (student, others), (examples, keys) = carry, xs
            if not players:
                student, metrics = update(student, frozen, examples, keys, loop=True)
                return (student, others), metrics
            shown = look(student[0], frozen, examples, keys)
            others, said = take_turns(players, train, others, frozen, shown)
            seen = parameters(others)
            student, metrics = update(student, frozen, examples, shown.keys, seen, loop=True)
            return (student, others), {**metrics, **said}

        (student, others), metrics = jax.lax.scan(
            body, (state.student, state.players), (examples, keys), unroll=len(keys) == 1
        )
        state = dataclasses.replace(state.moved(student), step=state.step + 1, players=others)
        return state, summary(metrics, examples)

    program = jax.jit(whole, donate_argnums=0)
    if fused:
        return Step(whole=program, run=program)
    parts = separate(prepare, look, update, train, players, summary)
    return Step(whole=program, run=parts)


def _prepare(
    objective: "Objective",
    settings: StepSettings,
    mesh: Mesh | None,
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
) -> tuple[PyTree, Array]:
    """Equation (1), shuffled: examples `[updates in all, accumulate, m, ...]`, a key for each m."""
    produce_key, order_key, loss_key = jax.random.split(
        jax.random.fold_in(state.key, state.step), 3
    )
    examples = objective.produce(state.trainable, frozen, batch, produce_key)
    examples = jax.lax.stop_gradient(examples)
    count = jax.tree.leaves(examples)[0].shape[0]
    grid = (settings.epochs * settings.updates, settings.accumulate)
    size = _micro_batch(count, settings, mesh)
    if settings.epochs == 1:
        order = jax.random.permutation(order_key, count)
    else:
        epoch_keys = jax.random.split(order_key, settings.epochs)
        order = jax.vmap(lambda key: jax.random.permutation(key, count))(epoch_keys).reshape(-1)

    def arrange(leaf: Array) -> Array:
        leaf = leaf[order].reshape(*grid, size, *leaf.shape[1:])
        if mesh is None:
            return leaf
        spec = NamedSharding(mesh, P(None, None, AXES))
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map(arrange, examples), jax.random.split(loss_key, grid)


def _micro_batch(count: int, settings: StepSettings, mesh: Mesh | None) -> int:
    parts = settings.updates * settings.accumulate
    if count % parts:
        raise ValueError(
            f"a step produces {count} examples, which {settings.updates} updates of "
            f"{settings.accumulate} micro-batches ({parts} parts) cannot divide: change the batch "
            f"size, updates or accumulate"
        )
    size = count // parts
    check_batch(
        mesh,
        size,
        f"a micro-batch ({count} examples a step / {settings.updates} updates / "
        f"{settings.accumulate} micro-batches)",
    )
    return size


def _summary(mesh: Mesh | None, epochs: int, metrics: Metrics, examples: PyTree) -> Metrics:
    """Metrics stacked over updates, `[updates in all]` each, to scalars."""
    updates, accumulate, size = jax.tree.leaves(examples)[0].shape[:3]
    summary = {name: jnp.mean(value) for name, value in metrics.items()}
    summary["grad_norm_max"] = jnp.max(metrics["grad_norm"])
    summary["examples"] = jnp.asarray(updates * accumulate * size // epochs, jnp.float32)
    watched = [value for name, value in metrics.items() if name.endswith(("loss", "grad_norm"))]
    summary["finite"] = jnp.all(jnp.isfinite(jnp.stack(watched)))
    if mesh is None:
        return summary
    return jax.lax.with_sharding_constraint(summary, replicated(mesh))
