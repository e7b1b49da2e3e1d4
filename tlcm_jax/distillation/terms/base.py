"""What a term is: something beside the consistency loss that looks at the student's prediction.

A term owns its settings, the networks and files it needs (`settings.load`), its loss, what it
reads of the prompts, the network it trains beside the student, and when it wants to stop. A new
one is a file beside this one and a line in `distillation/registry.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Key, Num, PyTree, UInt8

from tlcm_jax.distillation.checks import check_at_least, check_positive
from tlcm_jax.distillation.networks import AuxNetwork, Networks
from tlcm_jax.distillation.objective import NFE
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.lora import LoRAConfig


class StudentOutputs(NamedTuple):
    """What the student makes of a batch, for terms and auxiliary networks to look at.

    Attributes:
      x0: `[n, *latent]` its prediction.
      jump: `[n, *latent]` what is to meet the target, at time `target_time`; x0 itself in stage 2.
      target: `[n, *latent]` the consistency loss's target; None where no term needs it.
      sample: `[n, *latent]` its own sample of several steps, or a real one; None where there is
        neither.
      target_time: `[n]` of jump and target; the process's end counts as clean.
      conditioning: pytree `[n, ...]`.
      next_state: `[n, *latent]` where the student's own sampler went from what it is asked at, at
        time `next_time`, `[n]`; None where there is none (`Pairs`).
      z_m: `[n, *latent]` what it was asked at, at time `t_m`, `[n]`.
    """

    x0: Float[Array, " n *latent"]
    jump: Float[Array, " n *latent"]
    target: Float[Array, " n *latent"] | None
    sample: Float[Array, " n *latent"] | None
    target_time: Num[Array, " n"]
    conditioning: PyTree[Array]
    next_state: Float[Array, " n *latent"] | None = None
    next_time: Num[Array, " n"] | None = None
    z_m: Float[Array, " n *latent"] | None = None
    t_m: Num[Array, " n"] | None = None


class Context(NamedTuple):
    """What a term's loss may read beside the student's outputs; none of it is differentiated.

    Attributes:
      frozen: the stage's frozen tree.
      params: the term's own weights, as its `params`.
      inputs: what `prompt_inputs` made of the batch's prompts, `[n, ...]`; of a term that scores
        samples, what `weigh` made of their scores.
      aux_params: parameters of the auxiliary networks, by name.
      keys: one for each sample, `[n]`.
    """

    frozen: Mapping[str, Any]
    params: PyTree[Array]
    inputs: Mapping[str, PyTree[Array]]
    aux_params: Mapping[str, PyTree[Array]]
    keys: Key[Array, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a stage's loss, ready for use.

    Attributes:
      weight: beside the consistency loss.
      max_grad_ratio: the largest norm that its gradient at x0 may have, as a share of the
        consistency loss's; None leaves it as it is.
      params: its own frozen weights, a pytree of arrays.
    """

    weight: float
    max_grad_ratio: float | None = None
    params: Any = dataclasses.field(default_factory=dict)

    needs: ClassVar[tuple[str, ...]] = ()
    # Whether the host is to score the student's own samples, as images, when they are made.
    scores_samples: ClassVar[bool] = False

    @property
    def needed_outputs(self) -> tuple[str, ...]:
        """Fields of `StudentOutputs` that it cannot do without."""
        return self.needs

    @property
    def aux(self) -> AuxNetwork | None:
        """The network that is trained beside the student for it."""
        return None

    @property
    def nfe(self) -> NFE:
        """Network forwards a sample that it adds, but for those that make the outputs."""
        return NFE()

    def prompt_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the loss reads of the prompts: numpy arrays `[n, ...]`."""
        del prompts
        return {}

    def score_samples(
        self, images: UInt8[np.ndarray, "n h w 3"], inputs: Mapping[str, Any]
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """Scores of the student's samples, on the host, by name.

        Args:
          images: decoded.
          inputs: `prompt_inputs` of their prompts, `[n, ...]`.
        """
        raise NotImplementedError

    def weigh(self, scores: Mapping[str, Float[Array, " n"]]) -> dict[str, Any]:
        """What the loss reads of the scores of all samples of a refill: arrays `[n, ...]`."""
        raise NotImplementedError

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """The term of each sample, to be differentiated in `outputs`' x0 and jump; and metrics."""
        raise NotImplementedError

    def should_stop(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> str:
        """Why the stage should end after these rows of metrics, or "".

        Args:
          rows: of the stage so far.
          prefix: before the term's own metrics' names in them.
        """
        del rows, prefix
        return ""


class TermSettings(Protocol):
    """A term's frozen dataclass of choices."""

    @property
    def weight(self) -> float:
        """Beside the consistency loss; a term of weight 0 is left out."""

    def load(self, model: LatentModel, networks: Networks, adapter: LoRAConfig) -> Term | None:
        """The term, its weights read; None (and a warning) where it goes without.

        Args:
          model: the teacher.
          networks: of the stage.
          adapter: of auxiliary networks.

        Raises:
          ValueError: settings that do not fit the model.
          FileNotFoundError: weights that there are not.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxSettings:
    """The choices that terms with an auxiliary network share.

    Attributes:
      weight: of the term beside the consistency loss.
      aux_updates: of the auxiliary network, before each of the student's; 5 in DMD2.
      aux_learning_rate: of the auxiliary network, constant.
    """

    weight: float
    aux_updates: int = 5
    aux_learning_rate: float

    def __post_init__(self) -> None:
        check_at_least("weight", self.weight, 0)
        check_at_least("aux_updates", self.aux_updates, 1)
        check_positive("aux_learning_rate", self.aux_learning_rate)
