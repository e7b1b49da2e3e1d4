"""Stage 1: data-free multistep latent consistency distillation (TLCM, arXiv 2406.05768).

The time axis is cut into M segments (diffusion/paths.py). Inside a segment with lower milestone b
the student learns to jump to b in one step,

    f(z, t)    = x0 predicted by the student from eps(z, t),                     (1)
    g(z, t, b) = DDIM(z, f(z, t), t -> b),                                       (2)

by agreeing with itself at two neighbouring points of one teacher trajectory,

    t_n = max(t_m - skip, b),   z_n = DDIM(z_m, x0_w(z_m, t_m), t_m -> t_n),      (3)
    L = || g(z_m, t_m, b) - stopgrad g(z_n, t_n, b) ||^2,                        (4)

where x0_w is the guided teacher's, and where t_n = b the target is z_n itself: there the teacher
enters, and from there its knowledge moves up the segment. No image is needed: z_m lies on the
teacher's own path from noise.

*Node reuse*, the default: one path visits nodes in every segment, and the guided eps at a node
gives both the path's next jump and, by arithmetic alone, the pair (3). K nodes cost K guided calls
and make K pairs. *Literal*, the paper's algorithm: one pair a path, at the path's end.

With `loss_space` "x0", (4) is compared as x0, with the weight of multistep consistency models
(Heek et al. 2024, arXiv 2403.06807): DDIM is solved for the x0 that leads to the target,

    L = min(SNR(t_m) + 1, snr_limit) || f(z_m, t_m) - x0* ||^2,
    DDIM(z_m, x0*, t_m -> b) = stopgrad g(z_n, t_n, b).                          (5)

With `landing` "trajectory" the jump ends anywhere between, as in Hyper-SD (Ren et al. 2024, arXiv
2404.13686): b in (3) stays, and in (4) s ~ U{b .. t_n} takes its place.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion import ddim, paths
from tlcm_jax.diffusion.guidance import forwards, guided
from tlcm_jax.diffusion.prediction import Denoiser, predict_x0, x0_from_eps
from tlcm_jax.diffusion.schedule import NoiseSchedule, broadcast
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import (
    Evaluations,
    Objective,
    Parts,
    batch_size,
    check_at_least,
    check_at_most,
    check_choice,
    check_divides,
    consistency,
    mean_square,
    repeat,
)


@dataclass(frozen=True, kw_only=True)
class SegmentConsistencySettings:
    """The choices of stage 1.

    Attributes:
      segments: M; 8 in the paper.
      skip: t_m - t_n, in training steps; 20 in the paper.
      guidance_scale: w of the teacher, fixed; 8 in the paper.
      mode: "node_reuse", ours, or "literal", the paper's. At 9 nodes a path a toy (2-D mixture,
        three seeds) reached the same error by both at equal samples, node reuse with 2.7 times
        fewer evaluations.
      nodes_per_segment: of a path, with node reuse; 1 is the paper's step length. More lie closer
        to the true ODE at the same cost a pair (toy error 0.049, 0.037, 0.034 for 1, 2, 4), for
        fewer prompts in a batch of pairs.
      loss_space: "z", the paper's (4), or "x0", (5); z won on the toy.
      snr_limit: of the weight in (5); 5 in multistep consistency models.
      landing: where jumps end: "milestone", the paper's, or "trajectory", Hyper-SD's.
    """

    segments: int = 8
    skip: int = 20
    guidance_scale: float = 8.0
    mode: str = "node_reuse"
    nodes_per_segment: int = 2
    loss_space: str = "z"
    snr_limit: float = 5.0
    landing: str = "milestone"

    def __post_init__(self):
        check_at_least("segments", self.segments, 1)
        check_at_least("skip", self.skip, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_choice("mode", self.mode, ("node_reuse", "literal"))
        check_at_least("nodes_per_segment", self.nodes_per_segment, 1)
        check_choice("loss_space", self.loss_space, ("z", "x0"))
        check_at_least("snr_limit", self.snr_limit, 1)
        check_choice("landing", self.landing, ("milestone", "trajectory"))

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises a ValueError if these settings do not fit the time axis of `schedule`."""
        shortest = paths.shortest_segment(self.segments, schedule.train_steps)
        check_divides("segments", self.segments, schedule.train_steps)
        reason = f"the shortest of {self.segments} segments of {schedule.train_steps} times"
        check_at_most("nodes_per_segment", self.nodes_per_segment, shortest, reason)


class SegmentPairs(NamedTuple):
    """Examples of stage 1: two points of a teacher trajectory inside one segment.

    Attributes:
      z_m: `[n, h, w, c]` the noisier latent, at time `t_m`, `[n]`.
      z_n: `[n, h, w, c]` the cleaner latent, at time `t_n`, `[n]`, with boundary <= t_n < t_m.
      boundary: `[n]` where the jump ends: b, the segment's lower milestone, or s above it.
      conditioning: pytree `[n, ...]`.
    """

    z_m: Float[Array, "n h w c"]
    t_m: Int[Array, " n"]
    z_n: Float[Array, "n h w c"]
    t_n: Int[Array, " n"]
    boundary: Int[Array, " n"]
    conditioning: PyTree[Array]


def examples_per_prompt(settings: SegmentConsistencySettings) -> int:
    """Pairs that one prompt of a batch makes: the K nodes of its path, or the literal one."""
    if settings.mode == "literal":
        return 1
    return settings.segments * settings.nodes_per_segment + 1


def evaluations_per_sample(settings: SegmentConsistencySettings) -> Evaluations:
    """Network forwards a pair: K guided calls make K pairs; M + 1 make the literal one."""
    calls = settings.segments + 1 if settings.mode == "literal" else 1
    teacher = forwards(settings.guidance_scale) * calls
    return Evaluations(teacher=teacher, target=1.0, student=1.0)


def segment_consistency(
    networks: Networks,
    schedule: NoiseSchedule,
    latent_shape: tuple[int, int, int],
    settings: SegmentConsistencySettings,
) -> Objective:
    """Stage 1 as an objective.

    Args:
      networks: student, teacher, null conditioning.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the choices. With `mode` "literal" a pair costs M + 1 guided calls, 2 (M + 1)
        teacher forwards, whatever its segment: paths of 1 to M steps run in lock-step, as they
        must on an accelerator, and the shorter ones wait at their end.

    Returns:
      The objective; its examples are `SegmentPairs`, `examples_per_prompt` of them a prompt. Its
      metric `mse_z` is (4), whichever loss is chosen.

    Raises:
      ValueError: the settings do not fit the schedule.
    """
    settings.check(schedule)
    literal = settings.mode == "literal"

    def produce(
        trainable: PyTree[Array], frozen: PyTree[Array], batch: PyTree[Array], key: PRNGKeyArray
    ) -> SegmentPairs:
        del trainable
        conditioning = batch["conditioning"]
        size = batch_size(conditioning)
        noise_key, time_key = jax.random.split(key)
        if settings.landing == "trajectory":
            time_key, landing_key = jax.random.split(time_key)
        noise = jax.random.normal(noise_key, (size, *latent_shape))
        if literal:
            times = literal_times(time_key, size, settings.segments, schedule.train_steps)
        else:
            times = paths.node_times(
                time_key, size, settings.segments, settings.nodes_per_segment, schedule.train_steps
            )
        teacher = guided(networks.teacher(frozen), settings.guidance_scale, networks.null(frozen))
        # The path ends by waiting at its last node: nothing is asked beyond it.
        stops = jnp.concatenate([times, times[:, -1:]], axis=1)
        nodes, _ = paths.teacher_path(teacher, schedule, noise, stops, conditioning)
        if literal:
            nodes = jax.tree.map(lambda leaf: leaf[-1:], nodes)
        # Batch-major, so that merging the node axis keeps a sample's pairs on its own device.
        z, t, eps = (_merge(jnp.moveaxis(leaf, 0, 1)) for leaf in nodes)
        boundary = paths.segment_floor(t, settings.segments, schedule.train_steps)
        t_n = jnp.maximum(t - settings.skip, boundary)
        z_n = ddim.step(schedule, z, x0_from_eps(schedule, z, eps, t), t, t_n)  # (3)
        if settings.landing == "trajectory":
            boundary = jax.random.randint(landing_key, t.shape, boundary, t_n + 1)
        conditioning = repeat(conditioning, examples_per_prompt(settings))
        return jax.lax.stop_gradient(SegmentPairs(z, t, z_n, t_n, boundary, conditioning))

    def predict(student: Denoiser, pairs: SegmentPairs) -> Float[Array, "n h w c"]:
        return predict_x0(student, schedule, pairs.z_m, pairs.t_m, pairs.conditioning)

    def goal(target: Denoiser, pairs: SegmentPairs) -> Float[Array, "n h w c"]:
        _, _, z_n, t_n, boundary, conditioning = pairs
        x0_n = predict_x0(target, schedule, z_n, t_n, conditioning)
        jump = ddim.step(schedule, z_n, x0_n, t_n, boundary)
        return jax.lax.stop_gradient(jnp.where(broadcast(t_n == boundary), z_n, jump))

    def land(x0: Float[Array, "n h w c"], pairs: SegmentPairs) -> Float[Array, "n h w c"]:
        return ddim.step(schedule, pairs.z_m, x0, pairs.t_m, pairs.boundary)

    def distance(
        x0_m: Float[Array, "n h w c"], goal: Float[Array, "n h w c"], pairs: SegmentPairs
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        mse_z = mean_square(land(x0_m, pairs) - goal)  # (4)
        if settings.loss_space == "z":
            return mse_z, {"mse_z": mse_z}
        z_m, t_m = pairs.z_m, pairs.t_m
        x0_goal = ddim.inverse(schedule, z_m, goal, t_m, pairs.boundary)
        snr = jnp.square(schedule.alpha(t_m) / schedule.sigma(t_m))[:, 0, 0, 0]
        weight = jnp.minimum(snr + 1, settings.snr_limit)
        return weight * mean_square(x0_m - x0_goal), {"mse_z": mse_z}  # (5)

    def refresh(pairs: SegmentPairs, key: PRNGKeyArray) -> SegmentPairs:
        del key
        return pairs  # they lie on the teacher's path

    parts = Parts(
        predict=predict,
        goal=goal,
        land=land,
        level=lambda pairs: pairs.boundary,
        distance=distance,
        refresh=refresh,
    )
    return consistency(networks, produce, parts)


def literal_times(
    key: PRNGKeyArray, batch: int, segments: int, train_steps: int
) -> Int[Array, "batch stops"]:
    """The paper's paths: to a random t_m, in as many equal steps as segments lie above its floor.

    A segment s ~ U{0 .. M-1}, counted from the clean end, then t_m ~ U(b_s, b_{s+1}], reached
    from T - 1 in M - s steps.

    Returns:
      int32 times, `[batch, M + 1]`, of which the last is t_m; shorter paths wait there.
    """
    segment_key, time_key = jax.random.split(key)
    ascending = jnp.asarray(np.asarray(paths.milestones(segments, train_steps)[::-1]), jnp.int32)
    segment = jax.random.randint(segment_key, (batch,), 0, segments)
    low, high = ascending[segment], ascending[segment + 1]
    t_m = jax.random.randint(time_key, (batch,), low + 1, high + 1)
    start = jnp.full_like(t_m, train_steps - 1)
    return paths.equal_times(start, t_m, segments - segment, segments)


def _merge(nested: Array) -> Array:
    """Merges `[b, k, ...]` into `[b k, ...]`."""
    return nested.reshape(-1, *nested.shape[2:])
