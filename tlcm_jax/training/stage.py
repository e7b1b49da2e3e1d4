"""A stage, prepared: its stream of pairs, and what one training step of it does."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tlcm_jax.training.mesh import traced_on
from tlcm_jax.training.pairs import PairSource, PairStream
from tlcm_jax.training.sharding import RULES, Rules
from tlcm_jax.training.state import Aux, TrainState, create
from tlcm_jax.training.update import Loss, Metrics, make_update, sample_keys

# Of whoever draws the batches of the auxiliary networks (`update.sample_keys`).
_AUX_BATCH = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxTraining(Aux):
    """An auxiliary network, and how it is trained.

    Attributes:
      loss: `(params, frozen, outputs, keys) -> (per_sample [n], metrics)`.
      updates: before each of the student's.
    """

    loss: Callable[..., tuple[Array, Metrics]]
    updates: int

    def __post_init__(self) -> None:
        """Refuses one that never moves."""
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSpec:
    """What a stage is made of.

    Attributes:
      name: shown in the progress bar, rows and messages.
      steps: the student's updates, at least 1.
      pairs: how its data is made.
      loss: the student's (`update.make_update`).
      optimizer: the student's, clipping included.
      frozen: what the steps read and do not change, already placed.
      nfe_per_pair: network forwards a pair costs, for the throughput.
      accumulate: micro-batches of an update, the auxiliary networks' too.
      ema_decay: of the student's EMA, of this stage only: the next one trains the parameters
        themselves; 0 keeps none.
      aux: auxiliary networks by name; they live for this stage only.
      aux_batch: `(trainable, frozen, pairs, keys) -> outputs`, without gradients: what auxiliary
        networks are shown. Needed where there are any.
      should_stop: looks at the stage's rows after each, and says why the stage should end there,
        or "". A pure function of the rows, so that a resumed run ends where the first did (but
        for the shorter row that a preemption leaves).
    """

    name: str
    steps: int
    pairs: PairSource
    loss: Loss
    optimizer: optax.GradientTransformation
    frozen: PyTree[Array]
    nfe_per_pair: float
    accumulate: int = 1
    ema_decay: float = 0.0
    aux: Mapping[str, AuxTraining] = dataclasses.field(default_factory=dict)
    aux_batch: Callable[..., PyTree[Array]] | None = None
    should_stop: Callable[[Sequence[Mapping[str, Any]]], str] = lambda rows: ""

    def __post_init__(self) -> None:
        """Refuses a stage without steps."""
        if self.steps < 1:
            raise ValueError(f"stage {self.name!r} has {self.steps} steps: set at least 1")

    def create_state(self, params: PyTree[Array], key: Array) -> TrainState:
        """The state before the first step; see `state.create`."""
        return create(params, self.optimizer, key, self.aux, self.ema_decay > 0)


class Stage:
    """A stage's compiled programs.

    Attributes:
      spec: what it is made of.
      stream: its pairs.
      update: the student's update, jitted.
      aux_updates: of each auxiliary network, jitted.
    """

    def __init__(self, spec: StageSpec, mesh: Mesh | None = None, rules: Rules = RULES):
        """Compiles nothing yet.

        Args:
          spec: what it is made of.
          mesh: what the steps run on; None for one device.
          rules: where the state lies there.
        """
        self.spec = spec
        self.stream = PairStream(spec.pairs, mesh)
        self.update = make_update(
            spec.loss,
            spec.optimizer,
            accumulate=spec.accumulate,
            ema_decay=spec.ema_decay,
            mesh=mesh,
            rules=rules,
        )
        self.aux_updates = {
            name: make_update(
                _ignore_others(aux.loss),
                aux.optimizer,
                network=name,
                accumulate=spec.accumulate,
                mesh=mesh,
                rules=rules,
            )
            for name, aux in spec.aux.items()
        }
        self._rounds = max((aux.updates for aux in spec.aux.values()), default=0)
        self._aux_batch = jax.jit(traced_on(mesh, self._make_aux_batch))

    def step(
        self, state: TrainState, frozen: PyTree[Array], pairs: PyTree[Array]
    ) -> tuple[TrainState, Metrics]:
        """One step: the auxiliary networks' updates, then the student's.

        Nothing waits for the device. The state is donated.

        Returns:
          The new state, and metrics: the student's (`update.make_update`), each auxiliary
          network's by `NAME/...`, means over its updates, and `finite` of all of them.
        """
        reports: dict[str, list[Metrics]] = {name: [] for name in self.aux_updates}
        for turn in range(self._rounds):
            outputs = self._aux_batch(state, frozen, pairs, turn)
            for name, update in self.aux_updates.items():
                if turn < self.spec.aux[name].updates:
                    state, metrics = update(state, frozen, outputs, turn)
                    reports[name].append(metrics)
        state, metrics = self.update(state, frozen, pairs)
        return state, _with_reports(metrics, reports) if reports else metrics

    def _make_aux_batch(
        self, state: TrainState, frozen: PyTree[Array], pairs: PyTree[Array], turn: Array
    ) -> PyTree[Array]:
        if self.spec.aux_batch is None:
            raise ValueError(f"{sorted(self.spec.aux)} are shown nothing: give `aux_batch`")
        count = jax.tree.leaves(pairs)[0].shape[0]
        keys = sample_keys(state, count, _AUX_BATCH, turn)
        return self.spec.aux_batch(state.student.params, frozen, pairs, keys)


def _ignore_others(loss: Callable[..., tuple[Array, Metrics]]) -> Loss:
    return lambda params, frozen, batch, keys, others: loss(params, frozen, batch, keys)


@jax.jit
def _with_reports(metrics: Metrics, reports: Mapping[str, list[Metrics]]) -> Metrics:
    """The student's metrics, and the means of the auxiliary networks' beside them."""
    finite = [metrics["finite"]]
    merged = dict(metrics)
    for name, rounds in reports.items():
        finite += [report["finite"] for report in rounds]
        for key in rounds[0]:
            if key != "finite":
                merged[f"{name}/{key}"] = jnp.mean(jnp.stack([r[key] for r in rounds]))
    merged["finite"] = jnp.all(jnp.stack(finite))
    return merged
