"""The pairs of stage 1: where z_m comes from, and how the teacher goes on from it to z_n.

Four ways to come by a state inside a segment (`mode`):

* *node reuse*: one teacher path from noise visits nodes in every segment, and each is a state;
* *literal*, the paper's: a state is the end of a path of its own, in a step a segment;
* *single step*: a state is one step away from noise, wherever it lies, as in the first rows of the
  paper's ablation;
* *data*: real latents, noised, as in the relatives that have pictures. No path is walked.

From z_m the teacher walks to t_n in p equal sub-steps, by one of three solvers: *ddim*; *addim*,
DDIM adjusted for what its prediction averages over (solvers.py, equation 1), whose variance is
that of the real latents about the conditional prediction; *sde*, ancestral sampling (equation 2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion import ddim, solvers
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.diffusion.guidance import guided, guided_and_plain
from tlcm_jax.diffusion.prediction import x0_from_eps
from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.mlcd_settings import SegmentConsistencySettings
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import batch_size, mean_square, repeat


class SegmentPairs(NamedTuple):
    """Examples of stage 1: two points of a teacher trajectory inside one segment.

    Attributes:
      z_m: `[n, h, w, c]` the noisier latent, at time `t_m`, `[n]`.
      z_n: `[n, h, w, c]` the cleaner latent, at time `t_n`, `[n]`, with boundary <= t_n < t_m.
      boundary: `[n]` where the jump ends: b, the segment's lower milestone, or s above it.
      conditioning: pytree `[n, ...]`.
      data: `[n, h, w, c]` the real latent that z_m is a noisy copy of; None where there is none.
    """

    z_m: Float[Array, "n h w c"]
    t_m: Int[Array, " n"]
    z_n: Float[Array, "n h w c"]
    t_n: Int[Array, " n"]
    boundary: Int[Array, " n"]
    conditioning: PyTree[Array]
    data: Float[Array, "n h w c"] | None = None


def make_pairs(
    networks: Networks,
    schedule: NoiseSchedule,
    latent_shape: tuple[int, int, int],
    settings: SegmentConsistencySettings,
) -> Callable[..., SegmentPairs]:
    """The `produce` of stage 1.

    Args:
      networks: teacher and null conditioning.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the choices.

    Returns:
      `(trainable, frozen, batch, key) -> SegmentPairs`, without gradients.
    """
    train_steps = schedule.train_steps

    def produce(
        trainable: PyTree[Array], frozen: PyTree[Array], batch: PyTree[Array], key: PRNGKeyArray
    ) -> SegmentPairs:
        del trainable
        conditioning = batch["conditioning"]
        noise_key, time_key = jax.random.split(key)
        if settings.landing == "trajectory":
            time_key, landing_key = jax.random.split(time_key)
        if settings.solver == "sde":
            noise_key, walk_key = jax.random.split(noise_key)
        else:
            walk_key = noise_key  # nothing is drawn on the way
        ask = guided_and_plain(
            networks.teacher(frozen), settings.guidance_scale, networks.null(frozen)
        )
        data = None
        if settings.mode == "data":
            data = batch["latents"].astype(jnp.float32)
            _, t = paths.random_times(time_key, len(data), settings.segments, train_steps)
            z = schedule.diffuse(data, jax.random.normal(noise_key, data.shape), t)
            eps, plain = ask(z, t, conditioning)
        else:
            z, t, eps = states(frozen, conditioning, noise_key, time_key)
            plain = eps
            conditioning = repeat(conditioning, len(t) // batch_size(conditioning))
        floor = paths.segment_floor(t, settings.segments, train_steps)
        t_n = jnp.maximum(t - settings.skip, floor)
        steps = jnp.full_like(t, settings.teacher_substeps)
        stops = paths.equal_times(t, t_n, steps, settings.teacher_substeps)
        keys = jax.random.split(walk_key, settings.teacher_substeps)
        z_n = solved(z, eps, plain, stops[:, 0], stops[:, 1], data, keys[0])

        def further(z: Array, xs: tuple) -> tuple[Array, None]:
            now, then, key = xs
            eps, plain = ask(z, now, conditioning)
            return solved(z, eps, plain, now, then, data, key), None

        if settings.teacher_substeps > 1:
            z_n, _ = jax.lax.scan(further, z_n, (stops[:, 1:-1].T, stops[:, 2:].T, keys[1:]))
        boundary = floor
        if settings.landing == "trajectory":
            boundary = jax.random.randint(landing_key, t.shape, floor, t_n + 1)
        return jax.lax.stop_gradient(SegmentPairs(z, t, z_n, t_n, boundary, conditioning, data))

    def states(
        frozen: PyTree[Array],
        conditioning: PyTree[Array],
        noise_key: PRNGKeyArray,
        time_key: PRNGKeyArray,
    ) -> tuple[Float[Array, "n h w c"], Int[Array, " n"], Float[Array, "n h w c"]]:
        """Latents on the teacher's own paths, their times, and the guided eps there."""
        size, reuse = batch_size(conditioning), settings.mode == "node_reuse"
        noise = jax.random.normal(noise_key, (size, *latent_shape))
        if settings.mode == "literal":
            times = literal_times(time_key, size, settings.segments, train_steps)
        elif settings.mode == "single_step":
            _, t_m = paths.random_times(time_key, size, settings.segments, train_steps)
            times = jnp.stack([jnp.full_like(t_m, train_steps - 1), t_m], axis=1)
        else:
            times = paths.node_times(
                time_key, size, settings.segments, settings.nodes_per_segment, train_steps
            )
        teacher = guided(networks.teacher(frozen), settings.guidance_scale, networks.null(frozen))
        # The path ends by waiting at its last node: nothing is asked beyond it.
        stops = jnp.concatenate([times, times[:, -1:]], axis=1)
        nodes, _ = paths.teacher_path(teacher, schedule, noise, stops, conditioning)
        if not reuse:
            nodes = jax.tree.map(lambda leaf: leaf[-1:], nodes)
        # Batch-major, so that merging the node axis keeps a sample's pairs on its own device.
        z, t, eps = (_merge(jnp.moveaxis(leaf, 0, 1)) for leaf in nodes)
        return z, t, eps

    def solved(
        z: Float[Array, "n h w c"],
        eps: Float[Array, "n h w c"],
        plain: Float[Array, "n h w c"],
        t: Int[Array, " n"],
        s: Int[Array, " n"],
        data: Float[Array, "n h w c"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "n h w c"]:
        """One sub-step of the teacher, whose guided and conditional eps are given."""
        x0 = x0_from_eps(schedule, z, eps, t)
        if settings.solver == "sde":
            fresh = jax.random.normal(key, z.shape)
            return solvers.ancestral_step(schedule, z, x0, fresh, t, s)
        if settings.solver == "addim" and data is not None:
            variance = mean_square(data - x0_from_eps(schedule, z, plain, t))
            return solvers.adjusted_step(schedule, z, x0, variance, t, s)
        return ddim.step(schedule, z, x0, t, s)

    return produce


def literal_times(
    key: PRNGKeyArray, batch: int, segments: int, train_steps: int
) -> Int[Array, "batch stops"]:
    """The paper's paths: to a random t_m, in as many equal steps as segments lie above its floor.

    A segment s and t_m inside it (`paths.random_times`), reached from T - 1 in M - s steps.

    Returns:
      int32 times, `[batch, M + 1]`, of which the last is t_m; shorter paths wait there.
    """
    segment, t_m = paths.random_times(key, batch, segments, train_steps)
    start = jnp.full_like(t_m, train_steps - 1)
    return paths.equal_times(start, t_m, segments - segment, segments)


def _merge(nested: Array) -> Array:
    """Merges `[b, k, ...]` into `[b k, ...]`."""
    return nested.reshape(-1, *nested.shape[2:])
