"""Stage 2: latent consistency distillation at the milestones (LCD; TLCM, arXiv 2406.05768).

After stage 1 the student jumps inside a segment. Now its f itself, at every milestone b_k, is to
give the trajectory's end, so that a few steps suffice. The student makes its own data,

    z0 = x0 after q steps of its own sampler, each re-noised with fresh noise,   (1)
    z_m = alpha_m z0 + sigma_m e,   t_m ~ U{non-zero milestones},                (2)

(pure noise at the noisiest time, where sampling begins). The guided teacher goes to the milestone
below, t_n, in p equal steps, z_m -> z_n, and the student must see the same end from both:

    L = || f(z_m, t_m) - stopgrad f(z_n, t_n) ||^2,                              (3)

where t_n = 0 the target is z_n itself. Times may be weighed by min(SNR(t_m) + 1, snr_limit).

In place of (2), z_m may be a state that the sampler of (1) came through (`states = "visited"`,
ours): f is then asked where sampling asks it, and terms see where the sampler went from there.
With `rollout_gamma` 0 these states are the student's deterministic trajectory (TDM, arXiv
2503.06674).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, PyTree

from tlcm_jax.diffusion.guidance import Denoiser, nfe
from tlcm_jax.diffusion.process import Process, bcast_right
from tlcm_jax.diffusion.sampling import levels, normal, sample, student_step
from tlcm_jax.diffusion.timesteps import (
    check_timesteps,
    milestone_indices,
    milestones,
    subdivide,
)
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice, check_segments
from tlcm_jax.distillation.networks import Frozen, Networks, Params
from tlcm_jax.distillation.objective import NFE, Objective, Pairs, batch_size, repeat, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCDSettings:
    """The choices of stage 2.

    Attributes:
      segments: M; 8 in the paper.
      teacher_substeps: p; 3 in the paper, whose scores rise little from 2 on.
      guidance_scale: w of the teacher, fixed; 8 in the paper.
      rollout: how z0 of (1) is drawn. "renoise", the paper's sampler; or "milestones", ours: down
        all M milestones by the deterministic segment jumps of stage 1, for the first iterations,
        while f is still a segment jumper and "renoise" may be soft.
      rollout_timesteps: of "renoise", in training steps; q = 4 in the paper, these times.
      rollout_gamma: share of fresh noise between them, as in sampling; 1, the paper's, re-noises
        each x0, 0 is deterministic.
      states: what z_m is: "renoised", the paper's (2), or "visited", the rollout's own states at
        `rollout_timesteps`.
      states_per_rollout: how many t_m one z0 serves, all different; 1 in the paper.
      snr_limit: of the weight of times; 1, the paper's, weighs all milestones alike.
      weight: of (3) beside a stage's terms. 0 leaves the terms alone, as in DMD2, and then no
        teacher walks and no target is asked for.
      distance: of (3): "square", the paper's, or "none", where a term that compares with the
        target stands in its place, as LogCD's latent LPIPS does.
    """

    segments: int = 8
    teacher_substeps: int = 3
    guidance_scale: float = 8.0
    rollout: str = "renoise"
    rollout_timesteps: tuple[int, ...] = (999, 749, 499, 249)
    rollout_gamma: float = 1.0
    states: str = "renoised"
    states_per_rollout: int = 1
    snr_limit: float = 1.0
    weight: float = 1.0
    distance: str = "square"

    def __post_init__(self) -> None:
        check_at_least("segments", self.segments, 1)
        check_at_least("teacher_substeps", self.teacher_substeps, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_choice("rollout", self.rollout, ("renoise", "milestones"))
        check_at_least("rollout_gamma", self.rollout_gamma, 0)
        check_at_most("rollout_gamma", self.rollout_gamma, 1, "a share of the noise")
        check_choice("states", self.states, ("renoised", "visited"))
        if self.states == "visited" and self.rollout != "renoise":
            raise ValueError(
                f"states = 'visited' are those of rollout = 'renoise', not {self.rollout!r}"
            )
        check_at_least("states_per_rollout", self.states_per_rollout, 1)
        check_at_least("snr_limit", self.snr_limit, 1)
        check_at_least("weight", self.weight, 0)
        check_choice("distance", self.distance, ("square", "none"))
        if self.states == "visited":
            most, what = len(self.rollout_timesteps), "the number of rollout_timesteps"
        else:
            most, what = self.segments, "the number of milestones"
        check_at_most("states_per_rollout", self.states_per_rollout, most, what)

    def build(self, networks: Networks) -> "LCD":
        """The objective on `networks`.

        Raises:
          ValueError: settings that do not fit the process's time axis.
        """
        process = networks.process
        check_segments(process, self.segments, "teacher_substeps", self.teacher_substeps)
        check_timesteps(process, self.rollout_timesteps, "rollout_timesteps")
        known = milestone_indices(self.segments, process.num_train_timesteps)[:-1]
        if self.states == "visited" and not set(known).issuperset(self.rollout_timesteps):
            raise ValueError(
                f"states = 'visited': rollout_timesteps = {self.rollout_timesteps} must be among "
                f"the milestones {', '.join(map(str, known))}"
            )
        return LCD(self, networks)


@dataclasses.dataclass(frozen=True)
class LCD(Objective):
    """Equations (1) to (3) as an objective; its metric `mse_x0` is (3) without the weight."""

    settings: LCDSettings
    uses_student: ClassVar[bool] = True
    has_sample: ClassVar[bool] = True

    @property
    def has_next_state(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.has_next_time and self.settings.rollout_gamma == 1

    @property
    def has_next_time(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.settings.states == "visited"

    @property
    def weight(self) -> float:  # type: ignore[override]
        """See `Objective`."""
        return self.settings.weight

    @property
    def has_distance(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.settings.distance != "none"

    @property
    def pairs_per_prompt(self) -> int:
        """The states of its rollout."""
        return self.settings.states_per_rollout

    @property
    def nfe_per_pair(self) -> NFE:
        """Forwards a pair: q rollout steps shared by the rollout's states, p guided calls."""
        chosen = self.settings
        steps = chosen.segments if chosen.rollout == "milestones" else len(chosen.rollout_timesteps)
        rollout = steps / chosen.states_per_rollout
        if chosen.weight == 0:
            return NFE(rollout=rollout, student=1.0)
        teacher = nfe(chosen.guidance_scale) * chosen.teacher_substeps
        return NFE(rollout=rollout, teacher=teacher, target=1.0, student=1.0)

    def sample_pairs(
        self, trainable: Params, frozen: Frozen, batch: Mapping[str, Any], keys: Key[Array, " b"]
    ) -> Pairs:
        """See `Objective`."""
        chosen, networks = self.settings, self.networks
        process = networks.process
        noise_keys, *rest = split(keys, 4)
        student = networks.target(trainable, frozen)
        noise = normal(noise_keys, networks.latent_shape)
        make = self._visited if self.has_next_time else self._renoised
        pairs = make(student, noise, batch["conditioning"], tuple(rest))
        if chosen.weight == 0:
            return jax.lax.stop_gradient(pairs._replace(z_n=pairs.z_m, t_n=pairs.t_m))
        teacher = networks.guided_teacher(frozen, chosen.guidance_scale)
        substeps = jnp.full(pairs.t_m.shape, chosen.teacher_substeps, jnp.int32)
        stops = subdivide(process, pairs.t_m, pairs.t_n, substeps, chosen.teacher_substeps)
        _, z_n = teacher_path(teacher, process, pairs.z_m, stops, pairs.conditioning)
        return jax.lax.stop_gradient(pairs._replace(z_n=z_n))

    def _renoised(
        self,
        student: Denoiser,
        noise: Float[Array, " b *latent"],
        conditioning: PyTree[Array],
        keys: tuple[Key[Array, " b"], ...],
    ) -> Pairs:
        """Equations (1) and (2); z_n is still z_m."""
        chosen, process = self.settings, self.networks.process
        rollout_keys, time_keys, state_keys = keys
        if chosen.rollout == "milestones":
            # The sampler without fresh noise is the chain of segment jumps g.
            times = milestone_indices(chosen.segments, process.num_train_timesteps)[:-1]
            gamma = 0.0
        else:
            times, gamma = chosen.rollout_timesteps, chosen.rollout_gamma
        z0 = sample(student, process, noise, conditioning, times, rollout_keys, gamma)  # (1)
        states, size = chosen.states_per_rollout, batch_size(conditioning)
        z0, conditioning = repeat((z0, conditioning), states)
        index = milestone_choices(time_keys, chosen.segments, states).reshape(-1)
        falling = jnp.asarray(milestones(process, chosen.segments))
        t_m, t_n = falling[index], falling[index + 1]
        state_keys = jax.vmap(lambda key: jax.random.split(key, states))(state_keys)
        z_m = _renoised(process, z0, t_m, state_keys.reshape(size * states))
        clean = jnp.full_like(t_m, process.end)
        return Pairs(z_m, t_m, z_m, t_n, clean, z0, conditioning)

    def _visited(
        self,
        student: Denoiser,
        noise: Float[Array, " b *latent"],
        conditioning: PyTree[Array],
        keys: tuple[Key[Array, " b"], ...],
    ) -> Pairs:
        """Equation (1) and the states it came through; z_n is still z_m."""
        chosen, process = self.settings, self.networks.process
        rollout_keys, time_keys, _ = keys  # nothing is noised again
        times, count = chosen.rollout_timesteps, chosen.states_per_rollout
        gamma = chosen.rollout_gamma
        path = visited(student, process, noise, conditioning, times, rollout_keys, gamma)
        index = milestone_choices(time_keys, len(times), count)

        def at(shift: int) -> Array:
            taken = jax.vmap(lambda states, rows: states[rows])(path, index + shift)
            return taken.reshape(-1, *path.shape[2:])

        z0, conditioning = repeat((path[:, -1], conditioning), count)
        known = milestone_indices(chosen.segments, process.num_train_timesteps)
        places = jnp.asarray([known.index(t) for t in (*times, known[-1])])
        falling = jnp.asarray(milestones(process, chosen.segments))
        flat = index.reshape(-1)
        t_m, t_n = (falling[places[flat] + shift] for shift in (0, 1))
        clean = jnp.full_like(t_m, process.end)
        return Pairs(
            z_m=at(0),
            t_m=t_m,
            z_n=at(0),
            t_n=t_n,
            target_time=clean,
            sample=z0,
            conditioning=conditioning,
            next_state=at(1),
            next_time=falling[places[flat + 1]],
        )

    def target(self, denoiser: Denoiser, pairs: Pairs) -> Float[Array, " n *latent"]:
        """The right side of (3)."""
        if self.weight == 0:
            return jnp.zeros_like(pairs.z_m)
        x0_n = denoiser(pairs.z_n, pairs.t_n, pairs.conditioning)
        at_end = bcast_right(pairs.t_n == self.networks.process.end, x0_n)
        return jax.lax.stop_gradient(jnp.where(at_end, pairs.z_n, x0_n))

    def loss(
        self,
        x0: Float[Array, " n *latent"],
        target: Float[Array, " n *latent"],
        pairs: Pairs,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (3)."""
        if self.weight == 0:
            return jnp.zeros(len(x0)), {}
        mse_x0 = losses.mse(x0, target)
        if not self.has_distance:
            return jnp.zeros_like(mse_x0), {"mse_x0": mse_x0}
        snr = self.networks.process.snr(pairs.t_m)
        weight = self.weight * losses.min_snr_weight(snr, self.settings.snr_limit)
        return weight * mse_x0, {"mse_x0": mse_x0}

    def renoise(self, pairs: Pairs, keys: Key[Array, " n"]) -> Pairs:
        """Other milestones with fresh noise on the same z0; visited states stay as they are."""
        if self.has_next_time:
            return pairs
        process = self.networks.process
        time_keys, state_keys = split(keys, 2)
        index = milestone_choices(time_keys, self.settings.segments, 1).reshape(-1)
        t_m = jnp.asarray(milestones(process, self.settings.segments))[index]
        return pairs._replace(
            t_m=t_m, z_m=_renoised(process, jnp.asarray(pairs.sample), t_m, state_keys)
        )


def visited(
    student: Denoiser,
    process: Process,
    noise: Float[Array, " b *latent"],
    conditioning: PyTree[Array],
    timesteps: tuple[int, ...],
    keys: Key[Array, " b"],
    gamma: float = 1.0,
) -> Float[Array, "b states *latent"]:
    """What `sample` comes through at each of its times, and last what it ends with."""

    def advance(z: Array, xs: tuple) -> tuple[Array, Array]:
        index, t, level = xs
        xi = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, index), z.shape[1:])
        return student_step(student, process, z, t, level, xi, conditioning), z

    times = jnp.asarray([process.time(t) for t in timesteps])
    plan = jnp.asarray(levels(process, timesteps, gamma), jnp.float32)
    end, states = jax.lax.scan(advance, noise, (jnp.arange(len(timesteps)), times, plan))
    return jnp.moveaxis(jnp.concatenate([states, end[None]]), 0, 1)


def _renoised(
    process: Process, z0: Array, t: Num[Array, " n"], keys: Key[Array, " n"]
) -> Float[Array, " n *latent"]:
    """Equation (2)."""
    noise = normal(keys, z0.shape[1:])
    at_start = bcast_right(t == process.start, z0)
    return jnp.where(at_start, noise, process.add_noise(z0, noise, t))


def milestone_choices(keys: Key[Array, " b"], segments: int, states: int) -> Int[Array, "b states"]:
    """Draws `states` different non-zero milestones a rollout, evenly spread round the time axis.

    Returns:
      int32 indices into the falling milestones, in 0 .. M-1, each uniform by itself.
    """
    first = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, segments))(keys)
    return (first + jnp.arange(states) * segments // states) % segments
