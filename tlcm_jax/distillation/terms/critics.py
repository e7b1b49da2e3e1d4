"""What the terms with a critic have in common: how it is trained beside the student."""

from collections.abc import Callable
from dataclasses import dataclass

from tlcm_jax.distillation.checks import check_at_least, check_positive
from tlcm_jax.distillation.networks import Role
from tlcm_jax.distillation.objective import Critic


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """The choices that such terms share.

    Attributes:
      weight: of the term beside the consistency loss.
      critic_updates: of the critic, before each of the student's; 5 in DMD2.
      critic_learning_rate: of the critic, constant.
    """

    weight: float
    critic_updates: int = 5
    critic_learning_rate: float

    def __post_init__(self):
        check_at_least("weight", self.weight, 0)
        check_at_least("critic_updates", self.critic_updates, 1)
        check_positive("critic_learning_rate", self.critic_learning_rate)

    def critic(self, role: Role, loss: Callable, b1: float = 0.9) -> Critic:
        """Who plays `role`, trained by `loss` with AdamW of that `b1`."""
        return Critic(
            initial=role.initial,
            loss=loss,
            updates=self.critic_updates,
            learning_rate=self.critic_learning_rate,
            b1=b1,
        )
