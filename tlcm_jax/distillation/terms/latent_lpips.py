"""The perceptual term: latents are compared by a network's features as well as by their values.

TLCM (arXiv 2406.05768) adds latent LPIPS (Kang et al. 2024, arXiv 2405.05967) to the squared
distance of both consistency losses:

    L = lpips(landing, goal)                                                     (1)

with `models/latent_lpips.py`. What is compared is what the consistency loss compares.
"""

from dataclasses import dataclass

from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.checks import check_at_least
from tlcm_jax.distillation.networks import Networks, needed
from tlcm_jax.distillation.terms.compose import Made, Term


@dataclass(frozen=True, kw_only=True)
class PerceptualSettings:
    """The choices of the term.

    Attributes:
      weight: beside the mean square; the paper gives none, ours is 1.
      weights: the folder of the network's weights. Where there is none the term is left out, with
        a warning: the mean square alone is the paper's loss without it.
    """

    weight: float = 1.0
    weights: str

    def __post_init__(self):
        check_at_least("weight", self.weight, 0)


def perceptual(networks: Networks, schedule: NoiseSchedule, settings: PerceptualSettings) -> Term:
    """The term.

    Args:
      networks: the perceptual distance.
      schedule: not used; terms are built alike.
      settings: the choices.

    Raises:
      ValueError: there is no perceptual distance among the roles.
    """
    del schedule
    distance = needed(networks.perceptual, "latent_lpips", "a perceptual distance")

    def loss(
        made: Made,
        extras: PyTree[Array],
        frozen: PyTree[Array],
        critics: PyTree[Array],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        del extras, critics, key
        return distance(frozen)(made.landing, made.goal), {}  # (1)

    return Term(weight=settings.weight, loss=loss, needs=("goal",))
