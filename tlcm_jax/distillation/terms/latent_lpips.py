"""Latent LPIPS: latents are compared by a network's features as well as by their values.

TLCM (arXiv 2406.05768) adds latent LPIPS (Kang et al. 2024, arXiv 2405.05967) to the squared
distance of both consistency losses:

    L = lpips(jump, target)                                                      (1)

with `models/latent_lpips.py`. What is compared is what the consistency loss compares.
"""

import dataclasses
from typing import ClassVar

from absl import logging
from jaxtyping import Array, Float

from tlcm_jax.distillation.checks import check_at_least
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.terms.base import Context, StudentOutputs, Term
from tlcm_jax.families.base import LatentModel
from tlcm_jax.io.latent_lpips_files import is_latent_lpips, load_latent_lpips
from tlcm_jax.models.latent_lpips import ELatentLPIPS, LatentLPIPS, channels_of
from tlcm_jax.models.lora import LoRAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLPIPSSettings:
    """The choices of the term.

    Attributes:
      weight: beside the mean square; the paper gives none, ours is 1.
      weights: the folder of the network's weights.
      optional: where there are none the term is left out, with a warning: the mean square alone is
        the paper's loss without it. False makes it an error.
    """

    weight: float = 1.0
    weights: str
    optional: bool = True

    def __post_init__(self) -> None:
        check_at_least("weight", self.weight, 0)

    def load(
        self, model: LatentModel, networks: Networks, adapter: LoRAConfig
    ) -> "LatentLPIPSTerm | None":
        """See `TermSettings`."""
        del model, adapter
        if not is_latent_lpips(self.weights) and self.optional:
            logging.log_first_n(
                logging.WARNING,
                "no latent LPIPS in %s: the consistency losses are the mean square alone; train "
                "one with `python -m tlcm_jax.train_latent_lpips`",
                1,
                self.weights,
            )
            return None
        network, params = load_latent_lpips(self.weights)
        trained_for, channels = channels_of(params), networks.latent_shape[-1]
        if trained_for != channels:
            raise ValueError(
                f"{self.weights}: a latent LPIPS for {trained_for} channels, where this model's "
                f"latents have {channels}; train one with `python -m tlcm_jax.train_latent_lpips`"
            )
        return LatentLPIPSTerm(weight=self.weight, params=params, network=network)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLPIPSTerm(Term):
    """Equation (1).

    Attributes:
      network: of the distance.
    """

    network: LatentLPIPS | ELatentLPIPS
    needs: ClassVar[tuple[str, ...]] = ("target",)

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        variables = {"params": context.params}
        return self.network.apply(variables, outputs.jump, outputs.target), {}
