"""The adversarial term: one step of the student is to look like what it is held against.

Real and fake are re-noised to a common time t', and a discriminator D on the teacher's own
features (the down and middle half of its UNet with an adapter psi, and small heads) tells them
apart: with s = D(re-noised, t', c) averaged over heads and pixels, and h the hinge or softplus,

    L_D = h(1 - s_real) + h(1 + s_fake)   or   softplus(-s_real) + softplus(s_fake),     (1)
    L_G = -s_fake                         or   softplus(-s_fake).                        (2)

TLCM's last stage: fake is the prediction x at a milestone, real the student's own sample of
several steps; or, where states are made of real latents, these (SCott, Liu et al. 2024, arXiv
2403.01505). Inside a phase (PCM, Wang et al. 2024, arXiv 2405.18407): fake is where the
student's jump lands, real the consistency loss's target, both at the phase's lower milestone b,
and noise is added from there,

    z_t' = (alpha_t' / alpha_b) z_b + sqrt(1 - (alpha_t' / alpha_b)^2) e,   t' >= b.     (3)

Clean data is (3) with alpha_b = 1. The times 10, 250, 500, 750 are SDXL-Lightning's (Lin et al.
2024, arXiv 2402.13929).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion.process import NoiseSchedule, broadcast
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice
from tlcm_jax.distillation.networks import Networks, needed
from tlcm_jax.distillation.objective import Evaluations, repeat
from tlcm_jax.distillation.terms.compose import Made, Term
from tlcm_jax.distillation.terms.critics import CriticSettings

DISCRIMINATOR = "discriminator"


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(CriticSettings):
    """The choices of the term.

    Attributes:
      weight: beside the consistency loss; ours is 5e-3 beside distribution matching, 0.1 without.
      loss: "hinge" or "softplus".
      real: "sample", the student's own of several steps, or a real one where the objective's
        states are made of real ones; or "goal", the consistency target.
      times: how far above the compared latents' own time t' lies, one of these at random.
      layers: the UNet's blocks that heads look at, such as "down_blocks.1" and "mid_block"; none
        takes all.
      critic_learning_rate: of the discriminator; 1e-4 in the paper.
    """

    weight: float = 5e-3
    loss: str = "hinge"
    real: str = "sample"
    times: tuple[int, ...] = (10, 250, 500, 750)
    layers: tuple[str, ...] = ()
    critic_learning_rate: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        check_choice("loss", self.loss, ("hinge", "softplus"))
        check_choice("real", self.real, ("sample", "goal"))
        check_at_least("the number of times", len(self.times), 1)
        check_at_least("the smallest of times", min(self.times), 0)


def adversarial(networks: Networks, schedule: NoiseSchedule, settings: AdversarialSettings) -> Term:
    """The term.

    Args:
      networks: the discriminator's role.
      schedule: the teacher's noise schedule.
      settings: the choices.

    Returns:
      A term with one critic, `discriminator`, whose metrics are s_real and s_fake.

    Raises:
      ValueError: times beyond the schedule, no discriminator among the roles, or layers that its
        UNet does not have.
    """
    last = schedule.train_steps - 1
    reason = f"the last time of {schedule.train_steps}"
    check_at_most("the largest of times", max(settings.times), last, reason)
    build = needed(networks.discriminator, "adversarial", "a discriminator")
    role = build(settings.layers)
    hinge = settings.loss == "hinge"

    def renoised(
        z: Float[Array, "n h w c"], level: Int[Array, " n"], t: Int[Array, " n"], key: PRNGKeyArray
    ) -> Float[Array, "n h w c"]:
        signal = jnp.where(broadcast(level == 0), 1.0, schedule.alpha(level))
        kept = schedule.alpha(t) / signal
        # Where t' = level nothing is added, and rounding must not make a root of it.
        fresh = jnp.sqrt(jnp.maximum(1 - jnp.square(kept), 0))
        return kept * z + fresh * jax.random.normal(key, z.shape)  # (3)

    def times(level: Int[Array, " n"], key: PRNGKeyArray) -> Int[Array, " n"]:
        above = jax.random.choice(key, jnp.asarray(settings.times, jnp.int32), level.shape)
        return jnp.minimum(level + above, last)

    def fake_of(made: Made) -> Float[Array, "n h w c"]:
        return made.x0 if settings.real == "sample" else made.landing

    def level_of(made: Made) -> Int[Array, " n"]:
        # Whole samples are clean, wherever the student's jump lands.
        return jnp.zeros_like(made.level) if settings.real == "sample" else made.level

    def real_of(made: Made) -> Float[Array, "n h w c"]:
        real = made.sample if settings.real == "sample" else made.goal
        return needed(real, "adversarial", f"the {settings.real}")

    def loss(
        made: Made,
        extras: PyTree[Array],
        frozen: PyTree[Array],
        critics: PyTree[Array],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        del extras
        time_key, noise_key = jax.random.split(key)
        level = level_of(made)
        t = times(level, time_key)
        z = renoised(fake_of(made), level, t, noise_key)
        maps = role.network(critics[DISCRIMINATOR], frozen)(z, t, made.conditioning)
        value = _average(maps, (lambda s: -s) if hinge else (lambda s: jax.nn.softplus(-s)))
        return value, {}  # (2)

    def discriminator_loss(
        psi: PyTree[Array], frozen: PyTree[Array], made: Made, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        time_key, noise_key = jax.random.split(key)
        level = level_of(made)
        t, level = repeat((times(level, time_key), level), 2)
        # Real and fake of a sample side by side, so that each stays on its own device.
        both = jnp.stack([real_of(made), fake_of(made)], axis=1)
        z = renoised(both.reshape(-1, *both.shape[2:]), level, t, noise_key)
        maps = role.network(psi, frozen)(z, t, repeat(made.conditioning, 2))
        real, fake = [m[0::2] for m in maps], [m[1::2] for m in maps]
        if hinge:
            value = _average(real, lambda s: jax.nn.relu(1 - s))
            value = value + _average(fake, lambda s: jax.nn.relu(1 + s))
        else:
            value = _average(real, lambda s: jax.nn.softplus(-s))
            value = value + _average(fake, jax.nn.softplus)
        told = {"real": _average(real, lambda s: s), "fake": _average(fake, lambda s: s)}
        return value, told  # (1)

    return Term(
        weight=settings.weight,
        loss=loss,
        critics={DISCRIMINATOR: settings.critic(role, discriminator_loss, b1=0.0)},
        # A half of a UNet is counted as a whole.
        evaluations=Evaluations(critics=1.0 + 2.0 * settings.critic_updates),
        needs=(settings.real,),
    )


def _average(maps, function) -> Float[Array, " n"]:
    """The mean of a function of the logits: over each map's pixels, then over the maps."""
    means = [jnp.mean(function(m.astype(jnp.float32)), axis=(1, 2, 3)) for m in maps]
    return jnp.mean(jnp.stack(means), axis=0)
