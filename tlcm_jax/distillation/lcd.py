"""Stage 2: consistency between segments, at the milestones (TLCM, arXiv 2406.05768).

After stage 1 the student jumps inside a segment. Now its f itself, at every milestone b_k, is to
give the trajectory's end, so that a few steps suffice. The student makes its own data,

    z0 = x0 after q steps of its own sampler, each re-noised with fresh noise,   (1)
    z_m = alpha_m z0 + sigma_m e,   t_m ~ U{non-zero milestones},                (2)

(pure noise at t_m = T-1, where sampling begins). The guided teacher goes to the milestone below,
t_n, in p equal DDIM steps, z_m -> z_n, and the student must see the same end from both:

    L = || f(z_m, t_m) - stopgrad f(z_n, t_n) ||^2,                              (3)

where t_n = 0 the target is z_n itself. Times may be weighed by min(SNR(t_m) + 1, snr_limit).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.guidance import forwards, guided
from tlcm_jax.diffusion.prediction import Denoiser, predict_x0
from tlcm_jax.diffusion.process import NoiseSchedule, broadcast
from tlcm_jax.diffusion.sampling import check_timesteps, sample
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice, check_segments
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import (
    Evaluations,
    Objective,
    Parts,
    batch_size,
    consistency,
    mean_square,
    repeat,
    snr_weight,
)


@dataclass(frozen=True, kw_only=True)
class EndpointConsistencySettings:
    """The choices of stage 2.

    Attributes:
      segments: M; 8 in the paper.
      teacher_substeps: p; 3 in the paper, whose scores rise little from 2 on.
      guidance_scale: w of the teacher, fixed; 8 in the paper.
      rollout: how z0 of (1) is drawn. "renoise", the paper's sampler; or "milestones", ours: down
        all M milestones by the deterministic segment jumps of stage 1, for the first iterations,
        while f is still a segment jumper and "renoise" may be soft.
      rollout_timesteps: of "renoise"; q = 4 in the paper, these times.
      states_per_rollout: how many t_m one z0 serves, all different; 1 in the paper.
      snr_limit: of the weight of times; 1, the paper's, weighs all milestones alike.
      weight: of (3) beside a stage's terms. 0 leaves the terms alone, as in DMD2, and then no
        teacher walks and no target is asked for.
    """

    segments: int = 8
    teacher_substeps: int = 3
    guidance_scale: float = 8.0
    rollout: str = "renoise"
    rollout_timesteps: tuple[int, ...] = (999, 749, 499, 249)
    states_per_rollout: int = 1
    snr_limit: float = 1.0
    weight: float = 1.0

    def __post_init__(self):
        check_at_least("segments", self.segments, 1)
        check_at_least("teacher_substeps", self.teacher_substeps, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_choice("rollout", self.rollout, ("renoise", "milestones"))
        check_at_least("states_per_rollout", self.states_per_rollout, 1)
        check_at_least("snr_limit", self.snr_limit, 1)
        check_at_least("weight", self.weight, 0)
        check_at_most(
            "states_per_rollout", self.states_per_rollout, self.segments, "the number of milestones"
        )

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises a ValueError if these settings do not fit the time axis of `schedule`."""
        check_segments(schedule, self.segments, "teacher_substeps", self.teacher_substeps)
        check_timesteps(schedule, self.rollout_timesteps, "rollout_timesteps")


class EndpointPairs(NamedTuple):
    """Examples of stage 2: two neighbouring milestones of one teacher trajectory.

    Attributes:
      z_m: `[n, h, w, c]` the latent at the milestone `t_m`, `[n]`, above 0.
      z_n: `[n, h, w, c]` the teacher's latent at the next milestone, `t_n`, `[n]`.
      z0: `[n, h, w, c]` the student's own sample (1) that z_m is a noisy copy of.
      conditioning: pytree `[n, ...]`.
    """

    z_m: Float[Array, "n h w c"]
    t_m: Int[Array, " n"]
    z_n: Float[Array, "n h w c"]
    t_n: Int[Array, " n"]
    z0: Float[Array, "n h w c"]
    conditioning: PyTree[Array]


def examples_per_prompt(settings: EndpointConsistencySettings) -> int:
    """Pairs that one prompt of a batch makes."""
    return settings.states_per_rollout


def evaluations_per_sample(settings: EndpointConsistencySettings) -> Evaluations:
    """Network forwards a pair: q rollout steps shared by the rollout's states, p guided calls."""
    milestones = settings.rollout == "milestones"
    steps = settings.segments if milestones else len(settings.rollout_timesteps)
    rollout = steps / settings.states_per_rollout
    if settings.weight == 0:
        return Evaluations(rollout=rollout, student=1.0)
    teacher = forwards(settings.guidance_scale) * settings.teacher_substeps
    return Evaluations(rollout=rollout, teacher=teacher, target=1.0, student=1.0)


def endpoint_consistency(
    networks: Networks,
    schedule: NoiseSchedule,
    latent_shape: tuple[int, int, int],
    settings: EndpointConsistencySettings,
) -> Objective:
    """Stage 2 as an objective.

    Args:
      networks: student, teacher, null conditioning.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the choices.

    Returns:
      The objective; its examples are `EndpointPairs`, `states_per_rollout` of them a prompt.

    Raises:
      ValueError: the settings do not fit the schedule.
    """
    settings.check(schedule)
    milestones = paths.milestones(settings.segments, schedule.train_steps)
    if settings.rollout == "milestones":
        # The sampler without fresh noise is the chain of segment jumps g.
        rollout_timesteps, gamma = milestones[:-1], 0.0
    else:
        rollout_timesteps, gamma = settings.rollout_timesteps, 1.0

    def produce(
        trainable: PyTree[Array], frozen: PyTree[Array], batch: PyTree[Array], key: PRNGKeyArray
    ) -> EndpointPairs:
        noise_key, rollout_key, time_key, state_key = jax.random.split(key, 4)
        conditioning = batch["conditioning"]
        size = batch_size(conditioning)
        student = networks.target(trainable, frozen)
        noise = jax.random.normal(noise_key, (size, *latent_shape))
        z0 = sample(
            student, schedule, noise, conditioning, rollout_timesteps, rollout_key, gamma
        )  # (1)

        states = settings.states_per_rollout
        z0, conditioning = repeat((z0, conditioning), states)
        index = milestone_indices(time_key, size, settings.segments, states).reshape(-1)
        falling = jnp.asarray(milestones, jnp.int32)
        t_m, t_n = falling[index], falling[index + 1]
        z_m = renoised(z0, t_m, state_key)
        if settings.weight == 0:
            return jax.lax.stop_gradient(EndpointPairs(z_m, t_m, z_m, t_m, z0, conditioning))

        teacher = guided(networks.teacher(frozen), settings.guidance_scale, networks.null(frozen))
        substeps = jnp.full_like(t_m, settings.teacher_substeps)
        times = paths.equal_times(t_m, t_n, substeps, settings.teacher_substeps)
        _, z_n = paths.teacher_path(teacher, schedule, z_m, times, conditioning)
        return jax.lax.stop_gradient(EndpointPairs(z_m, t_m, z_n, t_n, z0, conditioning))

    def renoised(
        z0: Float[Array, "n h w c"], t: Int[Array, " n"], key: PRNGKeyArray
    ) -> Float[Array, "n h w c"]:
        fresh = jax.random.normal(key, z0.shape)
        at_start = broadcast(t == schedule.train_steps - 1)
        return jnp.where(at_start, fresh, schedule.diffuse(z0, fresh, t))  # (2)

    def predict(student: Denoiser, pairs: EndpointPairs) -> Float[Array, "n h w c"]:
        return predict_x0(student, schedule, pairs.z_m, pairs.t_m, pairs.conditioning)

    def goal(target: Denoiser, pairs: EndpointPairs) -> Float[Array, "n h w c"]:
        if settings.weight == 0:
            return jnp.zeros_like(pairs.z_m)
        x0_n = predict_x0(target, schedule, pairs.z_n, pairs.t_n, pairs.conditioning)
        return jax.lax.stop_gradient(jnp.where(broadcast(pairs.t_n == 0), pairs.z_n, x0_n))

    def distance(
        x0_m: Float[Array, "n h w c"], goal: Float[Array, "n h w c"], pairs: EndpointPairs
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        if settings.weight == 0:
            return jnp.zeros(len(x0_m)), {}
        mse_x0 = mean_square(x0_m - goal)  # (3)
        weight = settings.weight * snr_weight(schedule, pairs.t_m, settings.snr_limit)
        return weight * mse_x0, {"mse_x0": mse_x0}

    def refresh(pairs: EndpointPairs, key: PRNGKeyArray) -> EndpointPairs:
        time_key, state_key = jax.random.split(key)
        count = len(pairs.t_m)
        index = milestone_indices(time_key, count, settings.segments, 1).reshape(-1)
        t_m = jnp.asarray(milestones, jnp.int32)[index]
        return pairs._replace(t_m=t_m, z_m=renoised(pairs.z0, t_m, state_key))

    parts = Parts(
        predict=predict,
        goal=goal,
        land=lambda x0, pairs: x0,
        level=lambda pairs: jnp.zeros_like(pairs.t_m),
        distance=distance,
        refresh=refresh,
        sample=lambda pairs: pairs.z0,
    )
    return consistency(networks, produce, parts)


def milestone_indices(
    key: PRNGKeyArray, batch: int, segments: int, states: int
) -> Int[Array, "batch states"]:
    """Draws `states` different non-zero milestones a rollout, evenly spread round the time axis.

    Returns:
      int32 indices into the falling milestones, in 0 .. M-1, each uniform by itself.
    """
    first = jax.random.randint(key, (batch, 1), 0, segments)
    return (first + jnp.arange(states) * segments // states) % segments
