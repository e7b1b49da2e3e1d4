"""Regression on the teacher's whole trajectories: our cheaper way to what stage 2 is after.

Knowledge distillation of a sampler (Luhman and Luhman 2021, arXiv 2101.02388), at every milestone.
The guided teacher walks from pure noise to the end, p equal DDIM steps a segment,

    z_T-1 = e,   z_{b_k} -> z_{b_{k+1}},   ...,   z_0,                            (1)

and the student is to see the end from every milestone on the way,

    L = min(SNR(b_k) + 1, snr_limit) || f(z_{b_k}, b_k) - z_0 ||^2.               (2)

With 25 to 50 segments of one step every node of an ordinary sampler's path is a state; with a few
segments of many steps the path is as fine, and the states are those that the student samples at.

Where consistency (consistency.py, endpoints.py) hands the teacher's knowledge from point to point,
through targets of the student's own that are wrong at first, (2) gives it to all points at once:
the same solution, and no target network. What (1) alone lacks is states of the student's own
making, which are what its sampler meets from the second step on. So a share of the paths begins,
as stage 2's do (endpoints.py), at a milestone of the student's own sample, noised again,

    z0 = the student's sample,   z_{b_k} = alpha z0 + sigma e,                    (3)

and the teacher walks from there to the end, in as many steps.
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
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_segments
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
class TrajectoryRegressionSettings:
    """The choices of trajectory regression.

    Attributes:
      segments: M, milestones of a path, each one a state.
      teacher_substeps: p, DDIM steps a segment.
      guidance_scale: w of the teacher, fixed.
      snr_limit: of the weight in (2); 1 weighs all milestones alike.
      own_states: share of the paths that begin at the student's own states (3).
      rollout_timesteps: of the student's samples in (3).
    """

    segments: int = 8
    teacher_substeps: int = 2
    guidance_scale: float = 8.0
    snr_limit: float = 1.0
    own_states: float = 0.0
    rollout_timesteps: tuple[int, ...] = (999, 749, 499, 249)

    def __post_init__(self):
        check_at_least("segments", self.segments, 1)
        check_at_least("teacher_substeps", self.teacher_substeps, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("snr_limit", self.snr_limit, 1)
        check_at_least("own_states", self.own_states, 0)
        check_at_most("own_states", self.own_states, 1, "a share of the paths")
        if self.own_states and self.segments < 2:
            raise ValueError(
                f"own_states = {self.own_states}: needs at least 2 segments, for a milestone to"
                " begin at"
            )

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises a ValueError if these settings do not fit the time axis of `schedule`."""
        check_segments(schedule, self.segments, "teacher_substeps", self.teacher_substeps)
        check_timesteps(schedule, self.rollout_timesteps, "rollout_timesteps")


class TrajectoryPoints(NamedTuple):
    """Examples: a state on a teacher's trajectory, and its end.

    Attributes:
      z: `[n, h, w, c]` the latent at the time `t`, `[n]`, above 0: a milestone, or on a path that
        began below T - 1, one of as many states at equal distances.
      end: `[n, h, w, c]` the trajectory's z_0.
      conditioning: pytree `[n, ...]`.
    """

    z: Float[Array, "n h w c"]
    t: Int[Array, " n"]
    end: Float[Array, "n h w c"]
    conditioning: PyTree[Array]


def examples_per_prompt(settings: TrajectoryRegressionSettings) -> int:
    """Points that one prompt of a batch makes: the states of its path."""
    return settings.segments


def evaluations_per_sample(settings: TrajectoryRegressionSettings) -> Evaluations:
    """Network forwards a point: p guided calls, and its part of a rollout if there is one."""
    teacher = forwards(settings.guidance_scale) * settings.teacher_substeps
    rollout = len(settings.rollout_timesteps) / settings.segments if settings.own_states else 0.0
    return Evaluations(rollout=rollout, teacher=teacher, student=1.0)


def trajectory_regression(
    networks: Networks,
    schedule: NoiseSchedule,
    latent_shape: tuple[int, int, int],
    settings: TrajectoryRegressionSettings,
) -> Objective:
    """Equation (2) as an objective.

    Args:
      networks: student, teacher, null conditioning.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the choices.

    Returns:
      The objective; its examples are `TrajectoryPoints`, `segments` of them a prompt. Its metric
      `mse_x0` is (2) without the weight.

    Raises:
      ValueError: the settings do not fit the schedule.
    """
    settings.check(schedule)
    substeps = settings.teacher_substeps
    falling = paths.milestones(settings.segments, schedule.train_steps)

    def produce(
        trainable: PyTree[Array], frozen: PyTree[Array], batch: PyTree[Array], key: PRNGKeyArray
    ) -> TrajectoryPoints:
        conditioning = batch["conditioning"]
        size = batch_size(conditioning)
        noise_key, own_key = jax.random.split(key)
        z = jax.random.normal(noise_key, (size, *latent_shape))
        high, low = jnp.asarray(falling[:-1], jnp.int32), jnp.asarray(falling[1:], jnp.int32)
        stops = paths.equal_times(high, low, jnp.full_like(low, substeps), substeps)
        stops = jnp.append(stops[:, :-1].reshape(-1), 0)  # each milestone once
        times = jnp.broadcast_to(stops, (size, len(stops)))
        if settings.own_states:
            student = networks.target(trainable, frozen)
            z, times = own_starts(student, z, times, conditioning, own_key)
        teacher = guided(networks.teacher(frozen), settings.guidance_scale, networks.null(frozen))
        nodes, end = paths.teacher_path(teacher, schedule, z, times, conditioning)
        # Batch-major, so that merging the node axis keeps a sample's points on its own device.
        z, t = (jnp.moveaxis(leaf[::substeps], 0, 1) for leaf in (nodes.z, nodes.t))
        z, t = z.reshape(-1, *latent_shape), t.reshape(-1)
        end, conditioning = repeat((end, conditioning), settings.segments)
        return jax.lax.stop_gradient(TrajectoryPoints(z, t, end, conditioning))

    def own_starts(
        student: Denoiser,
        noise: Float[Array, "n h w c"],
        times: Int[Array, "n stops"],
        conditioning: PyTree[Array],
        key: PRNGKeyArray,
    ) -> tuple[Float[Array, "n h w c"], Int[Array, "n stops"]]:
        """The share of (3) in place of as many of the paths from noise."""
        own_key, rollout_key, start_key, fresh_key = jax.random.split(key, 4)
        z0 = sample(student, schedule, noise, conditioning, settings.rollout_timesteps, rollout_key)
        size, steps = len(noise), times.shape[1] - 1
        inner = jnp.asarray(falling[1:-1])
        start = jax.random.choice(start_key, inner, (size,))
        z = schedule.diffuse(z0, jax.random.normal(fresh_key, z0.shape), start)  # (3)
        equal = paths.equal_times(start, jnp.zeros_like(start), jnp.full(size, steps), steps)
        own = jax.random.bernoulli(own_key, settings.own_states, (size,))
        return jnp.where(broadcast(own), z, noise), jnp.where(own[:, None], equal, times)

    def predict(student: Denoiser, points: TrajectoryPoints) -> Float[Array, "n h w c"]:
        return predict_x0(student, schedule, points.z, points.t, points.conditioning)

    def distance(
        x0: Float[Array, "n h w c"], end: Float[Array, "n h w c"], points: TrajectoryPoints
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        mse_x0 = mean_square(x0 - end)
        weight = snr_weight(schedule, points.t, settings.snr_limit)
        return weight * mse_x0, {"mse_x0": mse_x0}  # (2)

    parts = Parts(
        predict=predict,
        goal=lambda target, points: points.end,
        land=lambda x0, points: x0,
        level=lambda points: jnp.zeros_like(points.t),
        distance=distance,
        refresh=lambda points, key: points,  # they lie on the teacher's path
    )
    return consistency(networks, produce, parts)
