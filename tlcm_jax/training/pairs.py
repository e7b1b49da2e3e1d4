"""The pairs of a stage, as a stream of shuffled mini-batches.

Data-free distillation makes its data as it goes. A *refill* draws pairs of a number of prompts
with the student as it stands,

    pairs_r = sample_pairs(theta, frozen, prompts_r, keys_r),                    (1)

without gradients and in a program of its own; shuffles them (pairs of one path must not meet in
one update); and hands them out in mini-batches, going through them `epochs` times, each in another
order. Everything is a function of (key, step) and, where pairs depend on the student, of theta at
the refill: the stream has no state that a checkpoint would have to hold. Where the host has to look
at pairs, it does so between drawing and shuffling (`PairSource.annotate`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from tlcm_jax.training.compilation import forward_options
from tlcm_jax.training.mesh import AXES, traced_on
from tlcm_jax.training.state import TrainState

# Folded into a stage's key for what is drawn here; updates fold in steps, which stay below.
_PAIRS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSource:
    """How a stage's pairs are made.

    Attributes:
      sample: `(trainable, frozen, batch, keys [b]) -> pairs`, leaves `[b * k, ...]`, the k pairs
        of a prompt side by side; traceable.
      batches: batch r of prompts, on the devices, leaves `[b, ...]`; a pure function of r.
      prompts: b, prompts of a refill.
      pairs_per_prompt: k.
      batch_size: pairs of a mini-batch; divides b k.
      epochs: how often the pairs of a refill are gone through.
      uses_student: pairs depend on `trainable`.
      annotate: `(frozen, pairs) -> pairs`, leaves `[b * k, ...]` on the devices as `sample` orders
        them: what the host adds to a refill. It may wait for the devices; every process calls it.
        A pure function, or a resumed run is not the same run.
      stored: `(r, batch r) -> pairs`, as `sample` gives them: refill r as it was drawn before, in
        the place of drawing it; None draws.
      texts: the prompts of batch r over all processes, for messages; None if they have none.
    """

    sample: Callable[..., PyTree[Array]]
    batches: Callable[[int], PyTree[Array]]
    prompts: int
    pairs_per_prompt: int
    batch_size: int
    epochs: int = 1
    uses_student: bool = False
    annotate: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]] | None = None
    stored: Callable[[int, PyTree[Array]], PyTree[Array]] | None = None
    texts: Callable[[int], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        """Refuses sizes that do not fit each other."""
        made = self.prompts * self.pairs_per_prompt
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if made % self.batch_size:
            good = [n for n in range(1, made + 1) if made % n == 0]
            nearest = min(good, key=lambda n: (abs(n - self.batch_size), n))
            raise ValueError(
                f"{self.prompts} prompts make {made} pairs, which batch_size = {self.batch_size} "
                f"does not divide; the nearest that does is {nearest}"
            )

    @property
    def steps_per_refill(self) -> int:
        """Updates between two refills."""
        return self.epochs * self.prompts * self.pairs_per_prompt // self.batch_size


class PairStream:
    """The mini-batches of a stage in order: number k is drawn for update k."""

    def __init__(self, source: PairSource, mesh: Mesh | None = None):
        """Compiles nothing yet.

        Args:
          source: how pairs are made.
          mesh: what they lie on; None for one device.
        """
        self.source = source
        options = forward_options(mesh)
        self.refill = jax.jit(
            traced_on(mesh, partial(_refill, source, mesh)), compiler_options=options
        )
        self.draw = jax.jit(traced_on(mesh, partial(_draw, source)), compiler_options=options)
        self._arrange = jax.jit(partial(_arrange, source, mesh))
        self._held: tuple[int, PyTree[Array]] | None = None

    def resumable(self, step: int) -> bool:
        """Whether a run that stopped after `step` updates can draw what follows.

        Pairs that depend on the student are drawn with the parameters at their refill, so in the
        middle of such a refill a run cannot be taken up.
        """
        return not self.source.uses_student or step % self.source.steps_per_refill == 0

    def next(self, step: int, state: TrainState, frozen: PyTree[Array]) -> PyTree[Array]:
        """Mini-batch number `step`, leaves `[batch_size, ...]`.

        Args:
          step: updates that are done; `state` is the state after them.
          state: for its key, and for the student's parameters.
          frozen: what is not trained.

        Raises:
          ValueError: a step in the middle of a refill that depends on the student and was not
            drawn by this stream.
        """
        number, place = divmod(step, self.source.steps_per_refill)
        if self._held is None or self._held[0] != number:
            if not self.resumable(step):
                raise ValueError(
                    f"step {step} lies inside a refill of {self.source.steps_per_refill} steps "
                    "that depends on the student: begin at its start"
                )
            self._held = None  # its memory, before the next is drawn
            batch = self.source.batches(number)
            which = state.key, jnp.asarray(number, jnp.uint32)
            if self.source.annotate is None and self.source.stored is None:
                pairs = self.refill(state.student.params, frozen, batch, *which)
            else:
                if self.source.stored is not None:
                    drawn = self.source.stored(number, batch)
                else:
                    drawn = self.draw(state.student.params, frozen, batch, *which)
                if self.source.annotate is not None:
                    drawn = self.source.annotate(frozen, drawn)
                pairs = self._arrange(drawn, *which)
            self._held = (number, pairs)
        return _take(self._held[1], jnp.asarray(place, jnp.int32))

    def prompts(self, step: int, key: PRNGKeyArray) -> list[str]:
        """The prompt of each pair of mini-batch number `step`, where the source knows them.

        Args:
          step: of the stage.
          key: of the stage's state.
        """
        if self.source.texts is None:
            return []
        number, place = divmod(step, self.source.steps_per_refill)
        order = _order(self.source, jax.random.split(jax.random.fold_in(key, _PAIRS))[1], number)
        rows = (
            order.reshape(self.source.steps_per_refill, -1)[place] // self.source.pairs_per_prompt
        )
        texts = self.source.texts(number)
        return [texts[row] for row in jax.device_get(rows)]


def _order(source: PairSource, key: PRNGKeyArray, number: int | Int[Array, ""]) -> Int[Array, " m"]:
    """Which pair of a refill comes when, over all epochs."""
    epoch_keys = jax.random.split(jax.random.fold_in(key, number), source.epochs)
    count = source.prompts * source.pairs_per_prompt
    return jax.vmap(lambda key: jax.random.permutation(key, count))(epoch_keys).reshape(-1)


def _refill(
    source: PairSource,
    mesh: Mesh | None,
    trainable: PyTree[Array],
    frozen: PyTree[Array],
    batch: PyTree[Array],
    key: PRNGKeyArray,
    number: Int[Array, ""],
) -> PyTree[Array]:
    """Equation (1), shuffled: leaves `[steps_per_refill, batch_size, ...]`."""
    pairs = _draw(source, trainable, frozen, batch, key, number)
    return _arrange(source, mesh, pairs, key, number)


def _draw(
    source: PairSource,
    trainable: PyTree[Array],
    frozen: PyTree[Array],
    batch: PyTree[Array],
    key: PRNGKeyArray,
    number: Int[Array, ""],
) -> PyTree[Array]:
    """Equation (1): leaves `[b * k, ...]`."""
    sample_key, _ = jax.random.split(jax.random.fold_in(key, _PAIRS))
    # The key of a prompt is that of its place in the stream of all prompts, however it is cut.
    places = number * source.prompts + jnp.arange(source.prompts, dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(sample_key, places)
    return jax.lax.stop_gradient(source.sample(trainable, frozen, batch, keys))


def _arrange(
    source: PairSource,
    mesh: Mesh | None,
    pairs: PyTree[Array],
    key: PRNGKeyArray,
    number: Int[Array, ""],
) -> PyTree[Array]:
    """Shuffled: leaves `[steps_per_refill, batch_size, ...]`."""
    _, order_key = jax.random.split(jax.random.fold_in(key, _PAIRS))
    order = _order(source, order_key, number)

    def arrange(leaf: Array) -> Array:
        leaf = leaf[order].reshape(source.steps_per_refill, source.batch_size, *leaf.shape[1:])
        if mesh is None:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(None, AXES)))

    return jax.tree.map(arrange, pairs)


@jax.jit
def _take(refill: PyTree[Array], place: Int[Array, ""]) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf[place], refill)
