"""Distribution matching: what the student makes is to be as likely as the teacher says.

Yin et al. 2023 (DMD, arXiv 2311.18828), with the update ratio of their second paper (DMD2, arXiv
2405.14867). The gradient of KL(student || teacher) over re-noised predictions is a difference of
scores, here of x0 predictions:

    z = alpha_t' x + sigma_t' e,   t' ~ U{low .. high},                          (1)
    dL/dx = (x0_fake(z) - x0_real(z)) / mean |x - x0_real(z)|                    (2)

per element of x, with the mean over a sample. The real score is the guided teacher's. The fake
one is that of the student's own predictions: an adapter phi on the same base, trained on them by

    || eps_phi(alpha_t x + sigma_t e, t) - e ||^2.                               (3)
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PRNGKeyArray

from tlcm_jax.diffusion.guidance import Denoiser, nfe
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.diffusion.timesteps import uniform_times
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most
from tlcm_jax.distillation.networks import (
    AuxNetwork,
    Frozen,
    Networks,
    Params,
    adapted,
    init_adapter,
)
from tlcm_jax.distillation.objective import NFE, split
from tlcm_jax.distillation.terms.base import AuxSettings, Context, StudentOutputs, Term
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.lora import LoRAConfig

FAKE_SCORE = "fake_score"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionMatchingSettings(AuxSettings):
    """The choices of the term. The paper names only its place; the values are DMD's.

    Attributes:
      guidance_scale: w of the real score.
      low: the smallest t', in training steps.
      high: the largest.
      aux_learning_rate: of the fake score; TLCM's last stages have 1e-5.
    """

    weight: float = 1.0
    guidance_scale: float = 8.0
    low: int = 20
    high: int = 980
    aux_learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("low", self.low, 0)
        check_at_least("high", self.high, self.low)

    def load(
        self, model: LatentModel, networks: Networks, adapter: LoRAConfig
    ) -> "DistributionMatching":
        """See `TermSettings`: the fake score is an adapter of the student's shape."""
        total = networks.process.num_train_timesteps
        check_at_most("high", self.high, total - 1, f"the last time of {total}")
        return DistributionMatching(
            weight=self.weight,
            settings=self,
            networks=networks,
            init=functools.partial(init_adapter, model, adapter),
            fake_score=functools.partial(adapted, model, adapter),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionMatching(Term):
    """Equation (2); its value is half the mean square of (2).

    Its gradient is (2) over the number of elements of x, as the mean squares of the consistency
    losses have it.

    Attributes:
      settings: the choices.
      networks: the teacher, which is the real score.
      init: `(key) -> phi`.
      fake_score: `(phi, frozen)` to the fake score's denoiser.
    """

    settings: DistributionMatchingSettings
    networks: Networks
    init: Callable[[PRNGKeyArray], Params]
    fake_score: Callable[[Params, Frozen], Denoiser]

    @property
    def aux(self) -> AuxNetwork:
        """The fake score."""
        return AuxNetwork(
            name=FAKE_SCORE,
            init=self.init,
            loss=self._fake_score_loss,
            updates=self.settings.aux_updates,
            learning_rate=self.settings.aux_learning_rate,
        )

    @property
    def nfe(self) -> NFE:
        """See `Term`."""
        teacher = nfe(self.settings.guidance_scale)
        return NFE(teacher=teacher, aux=1.0 + self.settings.aux_updates)

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        x, frozen = jax.lax.stop_gradient(outputs.x0), context.frozen
        z, t, _ = self._renoised(x, context.keys)
        teacher = self.networks.guided_teacher(frozen, self.settings.guidance_scale)
        fake_score = self.fake_score(context.aux_params[FAKE_SCORE], frozen)
        real_x0 = teacher(z, t, outputs.conditioning)
        fake_x0 = fake_score(z, t, outputs.conditioning)
        gradient = losses.distribution_matching_grad(x, real_x0, fake_x0)  # (2)
        surrogate = losses.mean_per_sample(gradient * (outputs.x0 - x))  # zero, with that gradient
        return 0.5 * losses.mean_per_sample(jnp.square(gradient)) + surrogate, {}

    def _fake_score_loss(
        self, phi: Params, frozen: Frozen, outputs: StudentOutputs, keys: Key[Array, " n"]
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (3)."""
        z, t, noise = self._renoised(outputs.x0, keys)
        x0 = self.fake_score(phi, frozen)(z, t, outputs.conditioning)
        return losses.mse(self.networks.process.to_eps(z, x0, t), noise), {}

    def _renoised(
        self, x: Float[Array, " n *latent"], keys: Key[Array, " n"]
    ) -> tuple[Array, Num[Array, " n"], Array]:
        """Equation (1): noisy latents, their times, and the noise."""
        process, (time_keys, noise_keys) = self.networks.process, split(keys, 2)
        low, high = (process.time(step) for step in (self.settings.low, self.settings.high))
        t = uniform_times(process, time_keys, jnp.full(len(x), low), jnp.full(len(x), high))
        noise = normal(noise_keys, x.shape[1:])
        return process.add_noise(x, noise, t), t, noise
