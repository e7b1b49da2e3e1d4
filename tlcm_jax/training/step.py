"""One training step of any stage: produce examples, then optimise on them.

A step draws its examples from an objective's gradient-free `produce`, shuffles them (examples of
one teacher path must not meet in one update), and makes `updates` optimiser updates, each on the
mean gradient of `accumulate` micro-batches. With theta the trainable leaves and K(step) =
fold_in(key, step):

  examples = produce(theta, frozen, batch, K_1)                                          (1)
  g = mean over micro-batches of grad_theta mean_i loss_i(theta, frozen, examples, K_3)  (2)
  theta <- theta + optimiser(g)                                                          (3)

(1) once, (2) and (3) `updates` times. The engine knows no loss by name.

In a game, other players (`players.py`) are trained beside the student. Before each of its updates
they are shown what it makes of that update's examples, and each takes updates of its own by (2)
and (3); the student's loss then sees their parameters, and has no gradient in them.
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
from tlcm_jax.training.players import Player, Shown, parameters, show, summed_up, take_turns
from tlcm_jax.training.sharding import RULES, Rules, tree_shardings
from tlcm_jax.training.state import TrainState

if TYPE_CHECKING:
    from tlcm_jax.distillation.objective import Objective

PyTree = Any
Metrics = dict[str, Array]

# What the step itself reports; an objective's metrics may not carry these names.
OWN_METRICS = ("loss", "grad_norm", "grad_norm_max", "examples", "finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step spends the examples it produced.

    Attributes:
      updates: optimiser updates a step.
      accumulate: micro-batches an update; raises the batch of an update without its memory.
      fused: whether the step is one compiled program, with scans over the updates and
        micro-batches, or one program that produces and one that updates, called `updates` times
        (and one for each other player). None: fused except on CPU, where XLA brings a
        convolution's gradients to its fast form only outside loops (measured: inside a scan they
        ran 25 times slower). The results agree to rounding.
    """

    updates: int = 1
    accumulate: int = 1
    fused: bool | None = None

    def __post_init__(self) -> None:
        """Refuses counts below one."""
        if self.updates < 1 or self.accumulate < 1:
            raise ValueError(
                f"updates and accumulate must be at least 1, got {self.updates} and "
                f"{self.accumulate}"
            )


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
      settings: updates and micro-batches a step.
      mesh: the mesh that the arguments lie on; None for one device.
      rules: where the state lies; as given to `sharding.tree_shardings`.
      players: who else is trained, by name. Then `objective.show` says what they are shown
        (`players.show`), and the loss gets one more argument, their parameters by name.

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
    update = partial(_update, objective.loss, optimizer, partial(_placed, mesh, rules))
    train = {
        name: partial(
            _update, player.loss, player.optimizer, partial(_placed_player, mesh, rules, name)
        )
        for name, player in players.items()
    }

    def whole(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        examples, keys = _prepare(objective, settings, mesh, state, frozen, batch)

        def body(carry: tuple, xs: tuple) -> tuple[tuple, Metrics]:
            (student, others), (examples, keys) = carry, xs
            if not players:
                student, metrics = update(student, frozen, examples, keys, loop=True)
                return (student, others), metrics
            shown = show(objective, players, student[0], frozen, examples, keys)
            others, said = take_turns(players, train, others, frozen, shown)
            seen = parameters(others)
            student, metrics = update(student, frozen, examples, shown.keys, seen, loop=True)
            return (student, others), {**metrics, **said}

        carry = ((state.trainable, state.opt_state), state.players)
        (student, others), metrics = jax.lax.scan(
            body, carry, (examples, keys), unroll=settings.updates == 1
        )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            trainable=student[0],
            opt_state=student[1],
            players=others,
        )
        return state, _summary(mesh, metrics, _count(examples))

    program = jax.jit(whole, donate_argnums=0)
    if fused:
        return Step(whole=program, run=program)

    prepare = jax.jit(partial(_prepare, objective, settings, mesh))

    @partial(jax.jit, donate_argnums=0)
    def one(carry: tuple, frozen: PyTree, examples: PyTree, keys: Array, index: Array) -> tuple:
        return update(carry, frozen, *_at((examples, keys), index))

    @jax.jit
    def shown_at(
        trainable: PyTree, frozen: PyTree, examples: PyTree, keys: Array, index: Array
    ) -> Shown:
        return show(objective, players, trainable, frozen, *_at((examples, keys), index))

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
        return step + 1, _summary(mesh, _stack(collected), _count(examples))

    def parts(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        examples, keys = prepare(state, frozen, batch)
        carry, collected = (state.trainable, state.opt_state), []
        others = dict(state.players)
        for index in range(settings.updates):
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
        step, summary = finish(state.step, examples, collected)
        return dataclasses.replace(
            state, step=step, trainable=carry[0], opt_state=carry[1], players=others
        ), summary

    return Step(whole=program, run=parts)


def _prepare(
    objective: "Objective",
    settings: StepSettings,
    mesh: Mesh | None,
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
) -> tuple[PyTree, Array]:
    """Equation (1), shuffled: examples `[updates, accumulate, m, ...]` and a key for each m."""
    produce_key, order_key, loss_key = jax.random.split(
        jax.random.fold_in(state.key, state.step), 3
    )
    examples = objective.produce(state.trainable, frozen, batch, produce_key)
    examples = jax.lax.stop_gradient(examples)
    count = jax.tree.leaves(examples)[0].shape[0]
    grid = (settings.updates, settings.accumulate)
    size = _micro_batch(count, settings, mesh)
    order = jax.random.permutation(order_key, count)

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


def _update(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    placed: Callable[[tuple], tuple],
    carry: tuple[PyTree, PyTree],
    frozen: PyTree,
    examples: PyTree,
    keys: Array,
    *seen: PyTree,
    loop: bool = False,
) -> tuple[tuple[PyTree, PyTree], Metrics]:
    """Equations (2) and (3) on examples `[accumulate, m, ...]`; `loop` chooses a scan over them.

    `seen` is what a loss gets besides; the same for every micro-batch.
    """
    trainable, opt_state = carry
    mean_loss_gradient = jax.grad(partial(_mean_loss, loss), has_aux=True)

    def gradient(trainable: PyTree, frozen: PyTree, examples: PyTree, key: Array) -> tuple:
        return mean_loss_gradient(trainable, frozen, examples, key, *seen)

    def add(total: tuple, micro: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, frozen, *micro)), None

    pieces = keys.shape[0]
    if loop and pieces > 1:
        first = jax.tree.map(lambda x: x[0], (examples, keys))
        shapes = jax.eval_shape(gradient, trainable, frozen, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (examples, keys))
    else:
        micros = [jax.tree.map(lambda x, i=i: x[i], (examples, keys)) for i in range(pieces)]
        total = gradient(trainable, frozen, *micros[0])
        for micro in micros[1:]:
            total, _ = add(total, micro)
    grads, metrics = jax.tree.map(lambda x: x / pieces, total)
    norm = optax.tree.norm(grads)
    changes, opt_state = optimizer.update(grads, opt_state, trainable)
    carry = (optax.apply_updates(trainable, changes), opt_state)
    return placed(carry), {**metrics, "grad_norm": norm}


def _placed(mesh: Mesh | None, rules: Rules, carry: tuple[PyTree, PyTree]) -> tuple:
    """The student's new leaves and moments, lying as the donated ones did."""
    if mesh is None:
        return carry
    named = {"trainable": carry[0], "opt_state": carry[1]}  # as in the state, for the rules
    placed = jax.lax.with_sharding_constraint(named, tree_shardings(named, mesh, rules))
    return placed["trainable"], placed["opt_state"]


def _placed_player(
    mesh: Mesh | None, rules: Rules, name: str, carry: tuple[PyTree, PyTree]
) -> tuple:
    """The same for another player."""
    if mesh is None:
        return carry
    named = {"players": {name: carry}}
    placed = jax.lax.with_sharding_constraint(named, tree_shardings(named, mesh, rules))
    return placed["players"][name]


def _mean_loss(
    loss_function: Callable,
    trainable: PyTree,
    frozen: PyTree,
    examples: PyTree,
    key: Array,
    *seen: PyTree,
) -> tuple[Array, Metrics]:
    per_sample, metrics = loss_function(trainable, frozen, examples, key, *seen)
    if per_sample.ndim != 1:
        raise ValueError(f"a loss must give one value a sample, [n], got {per_sample.shape}")
    clash = set(metrics) & set(OWN_METRICS)
    if clash:
        raise ValueError(f"metrics {sorted(clash)} are the step's own: rename the objective's")
    loss = jnp.mean(per_sample.astype(jnp.float32))
    means = {name: jnp.mean(value.astype(jnp.float32)) for name, value in metrics.items()}
    return loss, {**means, "loss": loss}


def _count(examples: PyTree) -> int:
    updates, accumulate, size = jax.tree.leaves(examples)[0].shape[:3]
    return updates * accumulate * size


def _at(tree: PyTree, index: Array) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def _stack(metrics: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)


def _summary(mesh: Mesh | None, metrics: Metrics, count: int) -> Metrics:
    """Metrics stacked over updates, `[updates]` each, to scalars."""
    summary = {name: jnp.mean(value) for name, value in metrics.items()}
    summary["grad_norm_max"] = jnp.max(metrics["grad_norm"])
    summary["examples"] = jnp.asarray(count, jnp.float32)
    watched = [value for name, value in metrics.items() if name.endswith(("loss", "grad_norm"))]
    summary["finite"] = jnp.all(jnp.isfinite(jnp.stack(watched)))
    if mesh is None:
        return summary
    return jax.lax.with_sharding_constraint(summary, replicated(mesh))
