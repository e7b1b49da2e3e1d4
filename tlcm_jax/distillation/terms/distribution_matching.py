"""Distribution matching: what the student makes is to be as likely as the teacher says.

Yin et al. 2023 (arXiv 2311.18828), with the update ratio of their second paper (arXiv 2405.14867).
The gradient of KL(student || teacher) over re-noised predictions is a difference of scores, here
of x0 predictions:

    z = alpha_t' x + sigma_t' e,   t' ~ U{low .. high},                          (1)
    dL/dx = (x0_fake(z) - x0_real(z)) / mean |x - x0_real(z)|                    (2)

per element of x, with the mean over a sample. The real score is the guided teacher's. The fake
one is that of the student's own predictions: an adapter phi on the same base, trained on them by

    || eps_phi(alpha_t x + sigma_t e, t) - e ||^2.                               (3)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.guidance import forwards, guided
from tlcm_jax.diffusion.prediction import predict_x0
from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.checks import check_at_least, check_at_most
from tlcm_jax.distillation.networks import Networks, needed
from tlcm_jax.distillation.objective import Evaluations, mean_square
from tlcm_jax.distillation.terms.compose import Made, Term
from tlcm_jax.distillation.terms.critics import CriticSettings

FAKE = "fake"


@dataclass(frozen=True, kw_only=True)
class DistributionMatchingSettings(CriticSettings):
    """The choices of the term. The paper names only its place; the values are DMD's.

    Attributes:
      guidance_scale: w of the real score.
      low: the smallest t', in training steps.
      high: the largest.
      critic_learning_rate: of the fake score; TLCM's last stages have 1e-5.
    """

    weight: float = 1.0
    guidance_scale: float = 8.0
    low: int = 20
    high: int = 980
    critic_learning_rate: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("low", self.low, 0)
        check_at_least("high", self.high, self.low)


def distribution_matching(
    networks: Networks, schedule: NoiseSchedule, settings: DistributionMatchingSettings
) -> Term:
    """The term.

    Args:
      networks: teacher, null conditioning and the fake score's role.
      schedule: the teacher's noise schedule.
      settings: the choices.

    Returns:
      A term with one critic, `fake`. Its loss is half the mean square of (2), and its gradient
      (2) over the number of elements of x, as the mean squares of the consistency losses have it.

    Raises:
      ValueError: times beyond the schedule, or no fake score among the roles.
    """
    last = schedule.train_steps - 1
    check_at_most("high", settings.high, last, f"the last time of {schedule.train_steps}")
    role = needed(networks.fake, "distribution_matching", "a fake score")

    def noised(x: Float[Array, "n h w c"], key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        time_key, noise_key = jax.random.split(key)
        t: Int[Array, " n"] = jax.random.randint(
            time_key, x.shape[:1], settings.low, settings.high + 1
        )
        noise = jax.random.normal(noise_key, x.shape)
        return schedule.diffuse(x, noise, t), t, noise  # (1)

    def loss(
        made: Made,
        extras: PyTree[Array],
        frozen: PyTree[Array],
        critics: PyTree[Array],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        del extras
        x, conditioning = jax.lax.stop_gradient(made.x0), made.conditioning
        z, t, _ = noised(x, key)
        teacher = guided(networks.teacher(frozen), settings.guidance_scale, networks.null(frozen))
        real = predict_x0(teacher, schedule, z, t, conditioning)
        fake = predict_x0(role.network(critics[FAKE], frozen), schedule, z, t, conditioning)
        size = jnp.mean(jnp.abs(x - real), axis=(1, 2, 3), keepdims=True)
        direction = (fake - real) / jnp.maximum(size, 1e-8)  # (2)
        pull = jnp.mean(direction * (made.x0 - x), axis=(1, 2, 3))
        return 0.5 * mean_square(direction) + pull, {}

    def fake_loss(
        phi: PyTree[Array], frozen: PyTree[Array], made: Made, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        z, t, noise = noised(made.x0, key)
        eps = role.network(phi, frozen)(z, t, made.conditioning)
        return mean_square(eps - noise), {}  # (3)

    return Term(
        weight=settings.weight,
        loss=loss,
        critics={FAKE: settings.critic(role, fake_loss)},
        evaluations=Evaluations(
            teacher=forwards(settings.guidance_scale), critics=1.0 + settings.critic_updates
        ),
    )
