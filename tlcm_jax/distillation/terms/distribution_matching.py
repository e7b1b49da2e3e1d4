"""Distribution matching: what the student makes is to be as likely as the teacher says.

Yin et al. 2023 (DMD, arXiv 2311.18828), with the update ratio of their second paper (DMD2, arXiv
2405.14867). The gradient of KL(student || teacher) over re-noised predictions is a difference of
scores, here of x0 predictions:

    z = alpha_t' x + sigma_t' e,   t' ~ U{low .. high},                          (1)
    dL/dx = (x0_fake(z) - x0_real(z)) / mean |x - x0_real(z)|                    (2)

per element of x, with the mean over a sample. The real score is the guided teacher's. The fake
one is that of the student's own predictions: an adapter phi on the same base, trained on them by

    || eps_phi(alpha_t x + sigma_t e, t) - e ||^2.                               (3)

*Along a trajectory* (`noised = "state"`: TDM, Luo et al. 2025, arXiv 2503.06674) the distributions
that are to agree are those of the states of the student's own deterministic sampler. What x leads
to at the end s of its segment is noised inside the segment alone, so that no two segments share a
time and one fake score serves all,

    z_s = step(z_m, x, t_m -> s),   z = z_s noised from s to t' ~ U{s .. t_m - 1},           (4)

and (2) at that z is the gradient at x. The noise that z holds is no longer the fresh e but m =
(z - alpha_t' x) / sigma_t', which depends on x; the fake score is trained with importance, as if
the x were noised straight to t',

    w || eps_phi(z, t') - m ||^2,   w = exp((|e|^2 - |m|^2) / 2n).                           (5)

TDM has the pseudo-Huber distance of x and a target where (2) has a mean, and sees all noise levels
of a segment where ours end at `low` and `high`.

*Decoupled* (`guidance_times = "own"`: Liu et al. 2025, arXiv 2511.22677): the guided real score is
the conditional one and a push, x0_real = c + (w - 1)(c - null), so that (2) is the sum of a part
that matches, x0_fake - c, and of one that guides. The latter alone carries a student to few steps,
the former keeps it from falling apart; each is taken at times of its own,

    x0_real = c(z, t') + (w - 1)(c(z'', t'') - null(z'', t'')),   t'' ~ U{low .. t_m},       (6)

with t' as in (1): what is settled already at t_m, above it, is not guided again. z and z'' are
x under one and the same noise (ours); at t'' = t' (6) is (2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PRNGKeyArray

from tlcm_jax.diffusion.guidance import Denoiser, guided_and_plain, nfe
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.diffusion.timesteps import uniform_times
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice
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
from tlcm_jax.distillation.terms.renoising import diffused
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.lora import LoRAConfig

FAKE_SCORE = "fake_score"
# Folded into a sample's key for the times of (6); far from what `split` counts.
_GUIDANCE = 0x67756964


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionMatchingSettings(AuxSettings):
    """The choices of the term. The paper names only its place; the values are DMD's.

    Attributes:
      guidance_scale: w of the real score.
      low: the smallest t', in training steps.
      high: the largest.
      noised: "prediction", DMD's (1), or "state", TDM's (4).
      guidance_times: of the real score's guidance: "shared" with the rest, DMD's, or its "own",
        decoupled DMD's (6).
      aux_learning_rate: of the fake score; TLCM's last stages have 1e-5.
    """

    weight: float = 1.0
    guidance_scale: float = 8.0
    low: int = 20
    high: int = 980
    noised: str = "prediction"
    guidance_times: str = "shared"
    aux_learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("low", self.low, 0)
        check_at_least("high", self.high, self.low)
        check_choice("noised", self.noised, ("prediction", "state"))
        check_choice("guidance_times", self.guidance_times, ("shared", "own"))
        if (self.noised, self.guidance_times) == ("state", "own"):
            raise ValueError(
                "guidance_times = 'own': with noised = 'state' all times lie below the student's; "
                "take 'shared'"
            )

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
    """Equation (2), at (1), (4) or (6); its value is half the mean square of (2).

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
    def needed_outputs(self) -> tuple[str, ...]:
        """See `Term`."""
        return ("next_time",) if self.settings.noised == "state" else ()

    @property
    def nfe(self) -> NFE:
        """See `Term`."""
        teacher = nfe(self.settings.guidance_scale) + (self.settings.guidance_times == "own")
        return NFE(teacher=teacher, aux=1.0 + self.settings.aux_updates)

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        x, frozen = jax.lax.stop_gradient(outputs.x0), context.frozen
        z, t, noise, _ = self._renoised(outputs._replace(x0=x), context.keys)
        fake_score = self.fake_score(context.aux_params[FAKE_SCORE], frozen)
        if self.settings.guidance_times == "own":
            real_x0 = self._decoupled(z, t, noise, outputs._replace(x0=x), context)
        else:
            teacher = self.networks.guided_teacher(frozen, self.settings.guidance_scale)
            real_x0 = teacher(z, t, outputs.conditioning)
        fake_x0 = fake_score(z, t, outputs.conditioning)
        gradient = losses.distribution_matching_grad(x, real_x0, fake_x0)  # (2)
        surrogate = losses.mean_per_sample(gradient * (outputs.x0 - x))  # zero, with that gradient
        return 0.5 * losses.mean_per_sample(jnp.square(gradient)) + surrogate, {}

    def _decoupled(
        self,
        z: Float[Array, " n *latent"],
        t: Num[Array, " n"],
        noise: Float[Array, " n *latent"],
        outputs: StudentOutputs,
        context: Context,
    ) -> Float[Array, " n *latent"]:
        """Equation (6): the real x0, its guidance taken at times of its own."""
        networks, frozen = self.networks, context.frozen
        process, teacher = networks.process, networks.teacher(context.frozen)
        own_keys = jax.vmap(lambda key: jax.random.fold_in(key, _GUIDANCE))(context.keys)
        low, high = self._bounds(outputs.t_m)
        own_t = uniform_times(process, own_keys, low, high)
        both = guided_and_plain(teacher, self.settings.guidance_scale, networks.null_of(frozen))
        noisy = process.add_noise(outputs.x0, noise, own_t)
        guided, plain = both(noisy, own_t, outputs.conditioning)
        return teacher(z, t, outputs.conditioning) + (guided - plain)

    def _fake_score_loss(
        self, phi: Params, frozen: Frozen, outputs: StudentOutputs, keys: Key[Array, " n"]
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (3) or (5)."""
        z, t, noise, held = self._renoised(outputs, keys)
        x0 = self.fake_score(phi, frozen)(z, t, outputs.conditioning)
        error = losses.mse(self.networks.process.to_eps(z, x0, t), held)
        if self.settings.noised == "state":
            error = losses.importance_weight(noise, held) * error
        return error, {}

    def _renoised(
        self, outputs: StudentOutputs, keys: Key[Array, " n"]
    ) -> tuple[Array, Num[Array, " n"], Array, Array]:
        """Equation (1) or (4): noisy latents, their times, the fresh noise and all they hold."""
        process, (time_keys, noise_keys) = self.networks.process, split(keys, 2)
        x = outputs.x0
        noise = normal(noise_keys, x.shape[1:])
        if self.settings.noised == "prediction":
            low, high = self._bounds()
            t = uniform_times(process, time_keys, jnp.full(len(x), low), jnp.full(len(x), high))
            return process.add_noise(x, noise, t), t, noise, noise
        z_m, t_m, end = (jnp.asarray(o) for o in (outputs.z_m, outputs.t_m, outputs.next_time))
        least, high = self._bounds(process.earlier(t_m, 1))
        lowest = jnp.maximum(least, end)
        t = uniform_times(process, time_keys, lowest, jnp.maximum(lowest, high))
        # The sampler's last step goes to clean data.
        last = bcast_right(end == process.end, x)
        state = jnp.where(last, x, process.step(z_m, x, t_m, end))
        z = diffused(process, state, end, t, noise)
        return z, t, noise, process.to_eps(z, x, t)

    def _bounds(self, top: Any = None) -> tuple[Any, Any]:
        """The process's times of `low` and `high`; of a `top` each, none of them above it."""
        process = self.networks.process
        low, high = (process.time(step) for step in (self.settings.low, self.settings.high))
        if top is None:
            return low, high
        below = jnp.minimum(jnp.full_like(top, high), top)
        return jnp.full_like(top, low), jnp.maximum(below, low)
