"""Knowledge distillation of the teacher's whole trajectories: a cheaper way to stage 2's end.

Knowledge distillation of a sampler (Luhman and Luhman 2021, arXiv 2101.02388), at every milestone.
The guided teacher walks from pure noise to the end, p equal steps a segment,

    z_T-1 = e,   z_{b_k} -> z_{b_{k+1}},   ...,   z_0,                            (1)

and the student is to see the end from every milestone on the way,

    L = min(SNR(b_k) + 1, snr_limit) || f(z_{b_k}, b_k) - z_0 ||^2.               (2)

With 25 to 50 segments of one step every point of an ordinary sampler's path is a state; with a few
segments of many steps the path is as fine, and the states are those that the student samples at.

Where consistency (mlcd.py, lcd.py) hands the teacher's knowledge from point to point, through
targets of the student's own that are wrong at first, (2) gives it to all points at once: the same
solution, and no target network. What (1) alone lacks is states of the student's own making, which
are what its sampler meets from the second step on. So a share of the paths begins, as stage 2's
do (lcd.py), at a milestone of the student's own sample, noised again,

    z0 = the student's sample,   z_{b_k} = alpha z0 + sigma e,                    (3)

and the teacher walks from there to the end, in as many steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PyTree

from tlcm_jax.diffusion.guidance import Denoiser, nfe
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.diffusion.sampling import normal, sample
from tlcm_jax.diffusion.timesteps import check_timesteps, milestones, subdivide
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_segments
from tlcm_jax.distillation.networks import Frozen, Networks, Params
from tlcm_jax.distillation.objective import NFE, Objective, Pairs, batch_size, repeat, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryKDSettings:
    """The choices of trajectory distillation.

    Attributes:
      segments: M, milestones of a path, each one a state.
      teacher_substeps: p, steps a segment.
      guidance_scale: w of the teacher, fixed.
      snr_limit: of the weight in (2); 1 weighs all milestones alike.
      own_states: share of the paths that begin at the student's own states (3).
      rollout_timesteps: of the student's samples in (3), in training steps.
    """

    segments: int = 8
    teacher_substeps: int = 2
    guidance_scale: float = 8.0
    snr_limit: float = 1.0
    own_states: float = 0.0
    rollout_timesteps: tuple[int, ...] = (999, 749, 499, 249)

    def __post_init__(self) -> None:
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

    def build(self, networks: Networks) -> "TrajectoryKD":
        """The objective on `networks`.

        Raises:
          ValueError: settings that do not fit the process's time axis.
        """
        process = networks.process
        check_segments(process, self.segments, "teacher_substeps", self.teacher_substeps)
        check_timesteps(process, self.rollout_timesteps, "rollout_timesteps")
        return TrajectoryKD(self, networks)


@dataclasses.dataclass(frozen=True)
class TrajectoryKD(Objective):
    """Equation (2) as an objective; its metric `mse_x0` is (2) without the weight.

    Its pairs are states above 0 with the trajectory's end in the place of z_n.
    """

    settings: TrajectoryKDSettings

    @property
    def uses_student(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.settings.own_states > 0

    @property
    def pairs_per_prompt(self) -> int:
        """The states of its path."""
        return self.settings.segments

    @property
    def nfe_per_pair(self) -> NFE:
        """Forwards a state: p guided calls, and its part of a rollout if there is one."""
        chosen = self.settings
        teacher = nfe(chosen.guidance_scale) * chosen.teacher_substeps
        rollout = len(chosen.rollout_timesteps) / chosen.segments if chosen.own_states else 0.0
        return NFE(rollout=rollout, teacher=teacher, student=1.0)

    def sample_pairs(
        self, trainable: Params, frozen: Frozen, batch: Mapping[str, Any], keys: Key[Array, " b"]
    ) -> Pairs:
        """See `Objective`."""
        chosen, networks, conditioning = self.settings, self.networks, batch["conditioning"]
        process, substeps, size = networks.process, chosen.teacher_substeps, len(keys)
        noise_keys, own_keys = split(keys, 2)
        z = normal(noise_keys, networks.latent_shape)
        falling = jnp.asarray(milestones(process, chosen.segments))
        per_segment = jnp.full(chosen.segments, substeps, jnp.int32)
        stops = subdivide(process, falling[:-1], falling[1:], per_segment, substeps)
        stops = jnp.append(stops[:, :-1].reshape(-1), falling[-1])  # each milestone once
        times = jnp.broadcast_to(stops, (size, len(stops)))
        if chosen.own_states:
            student = networks.target(trainable, frozen)
            z, times = self._own_starts(student, z, times, conditioning, own_keys)
        teacher = networks.guided_teacher(frozen, chosen.guidance_scale)
        points, end = teacher_path(teacher, process, z, times, conditioning)
        # Batch-major, so that merging the time axis keeps a sample's states on its own device.
        z, t = (
            jnp.moveaxis(leaf[::substeps], 0, 1).reshape(-1, *leaf.shape[2:])
            for leaf in (points.z, points.t)
        )
        end, conditioning = repeat((end, conditioning), chosen.segments)
        clean = jnp.full_like(t, process.end)
        return jax.lax.stop_gradient(Pairs(z, t, end, clean, clean, None, conditioning))

    def _own_starts(
        self,
        student: Denoiser,
        noise: Float[Array, " b *latent"],
        times: Num[Array, "b stops"],
        conditioning: PyTree[Array],
        keys: Key[Array, " b"],
    ) -> tuple[Float[Array, " b *latent"], Num[Array, "b stops"]]:
        """The share of (3) in place of as many of the paths from noise."""
        chosen, process = self.settings, self.networks.process
        own_keys, rollout_keys, start_keys, fresh_keys = split(keys, 4)
        z0 = sample(student, process, noise, conditioning, chosen.rollout_timesteps, rollout_keys)
        inner = jnp.asarray(milestones(process, chosen.segments)[1:-1])
        start = jax.vmap(lambda key: jax.random.choice(key, inner))(start_keys)
        z = process.add_noise(z0, normal(fresh_keys, z0.shape[1:]), start)  # (3)
        size, steps = batch_size(conditioning), times.shape[1] - 1
        end = jnp.full_like(start, process.end)
        equal = subdivide(process, start, end, jnp.full(size, steps, jnp.int32), steps)
        share = chosen.own_states
        own = jax.vmap(lambda key: jax.random.bernoulli(key, share))(own_keys)
        return jnp.where(bcast_right(own, z), z, noise), jnp.where(own[:, None], equal, times)

    def target(self, denoiser: Denoiser, pairs: Pairs) -> Float[Array, " n *latent"]:
        """The trajectory's end."""
        del denoiser
        return pairs.z_n

    def loss(
        self,
        x0: Float[Array, " n *latent"],
        target: Float[Array, " n *latent"],
        pairs: Pairs,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (2)."""
        mse_x0 = losses.mse(x0, target)
        snr = self.networks.process.snr(pairs.t_m)
        return losses.min_snr_weight(snr, self.settings.snr_limit) * mse_x0, {"mse_x0": mse_x0}
