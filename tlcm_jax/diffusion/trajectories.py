"""Where in time a trajectory stops, and the teacher's walk along those stops.

The time axis is cut into M segments by the milestones

    b_k = int(linspace(T-1, 0, M+1)),                                            (1)

for TLCM's M = 8 and T = 1000: 999 874 749 624 499 374 249 124 0. A time t > 0 belongs to the
segment with b_lo < t <= b_hi. The teacher walks from noise at T-1 by guided DDIM steps, which
stop at its *nodes*,

    eps_k = eps_w(z_k, t_k),   z_{k+1} = DDIM(z_k, x0(z_k, eps_k), t_k -> t_{k+1}),   (2)

and every node costs one guided call, whatever is done with its eps afterwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from tlcm_jax.diffusion import ddim
from tlcm_jax.diffusion.prediction import Denoiser, x0_from_eps
from tlcm_jax.diffusion.process import NoiseSchedule


def milestones(segments: int, train_steps: int = 1000) -> tuple[int, ...]:
    """Equation (1): the M + 1 milestones, falling from T - 1 to 0.

    Args:
      segments: M, in 1 .. T-1.
      train_steps: T.

    Raises:
      ValueError: the time axis has not that many segments.
    """
    if not 1 <= segments < train_steps:
        raise ValueError(
            f"segments = {segments}: a schedule of {train_steps} times can be cut into"
            f" 1 to {train_steps - 1} segments"
        )
    return tuple(int(b) for b in np.linspace(train_steps - 1, 0, segments + 1))


def shortest_segment(segments: int, train_steps: int = 1000) -> int:
    """The number of times in the shortest of the M segments."""
    return int(np.min(-np.diff(milestones(segments, train_steps))))


def segment_floor(t: Int[Array, " b"], segments: int, train_steps: int = 1000) -> Int[Array, " b"]:
    """The lower milestone b_lo < t of each time t > 0."""
    ascending = jnp.asarray(milestones(segments, train_steps)[::-1], jnp.int32)
    # Compared with all M + 1 at once: no loop, and nothing for a sharded batch to exchange.
    return ascending[jnp.searchsorted(ascending, t, side="left", method="compare_all") - 1]


def random_times(
    key: PRNGKeyArray, batch: int, segments: int, train_steps: int = 1000
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Draws a segment s ~ U{0 .. M-1}, counted from the clean end, and t ~ U(b_s, b_{s+1}].

    Returns:
      The segments and the times, int32.
    """
    segment_key, time_key = jax.random.split(key)
    ascending = jnp.asarray(np.asarray(milestones(segments, train_steps)[::-1]), jnp.int32)
    segment = jax.random.randint(segment_key, (batch,), 0, segments)
    low, high = ascending[segment], ascending[segment + 1]
    return segment, jax.random.randint(time_key, (batch,), low + 1, high + 1)


def node_times(
    key: PRNGKeyArray,
    batch: int,
    segments: int,
    nodes_per_segment: int,
    train_steps: int = 1000,
) -> Int[Array, "batch nodes"]:
    """Random stops of a batch of paths, stratified over the time axis.

    The first node is T - 1, where sampling begins. Then each segment (b_lo, b_hi] holds
    `nodes_per_segment` = N of them,

        t = b_lo + 1 + floor((j + u) / N (b_hi - b_lo)),   j = N-1 .. 0,              (3)

    with one u ~ U[0, 1) a path: each time is as likely as any other of its segment, and the
    nodes of a path keep their distance.

    Args:
      key: used once.
      batch: number of paths.
      segments: M.
      nodes_per_segment: N, at most the length of the shortest segment.
      train_steps: T.

    Returns:
      int32 times, falling along the second axis, `[batch, M N + 1]`.
    """
    edges = np.asarray(milestones(segments, train_steps))
    high, low = edges[:-1, None], edges[1:, None]
    stratum = np.arange(nodes_per_segment)[::-1]
    u = jax.random.uniform(key, (batch, 1, 1))
    offset = jnp.floor((stratum + u) / nodes_per_segment * (high - low)).astype(jnp.int32)
    # stratum + u can round up to the next integer in float32.
    inner = jnp.minimum(low + 1 + offset, high).reshape(batch, segments * nodes_per_segment)
    start = jnp.full((batch, 1), train_steps - 1, inner.dtype)
    return jnp.concatenate([start, inner], axis=1)


def equal_times(
    start: Int[Array, " b"], end: Int[Array, " b"], steps: Int[Array, " b"], length: int
) -> Int[Array, "b stops"]:
    """Each path's own number of equal steps from `start` down to `end`, padded by waiting there.

    Args:
      start: first time of each path.
      end: last time of each path, at most `start`.
      steps: number of equal steps of each path, in 1 .. `length`.
      length: number of steps in the result; a path of fewer repeats `end`, where DDIM is the
        identity.

    Returns:
      int32 times, `[b, length + 1]`, whose ends are exact and whose inner stops are rounded up.
    """
    done = jnp.minimum(jnp.arange(length + 1), steps[:, None])
    return start[:, None] - (start - end)[:, None] * done // steps[:, None]


class Nodes(NamedTuple):
    """What the teacher saw at each of the k nodes of its walk, time-major.

    Attributes:
      z: `[k, b, h, w, c]` latents.
      t: `[k, b]` their times.
      eps: `[k, b, h, w, c]` the denoiser's output there.
    """

    z: Float[Array, "k b h w c"]
    t: Int[Array, "k b"]
    eps: Float[Array, "k b h w c"]


def teacher_path(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    z: Float[Array, "b h w c"],
    times: Int[Array, "b stops"],
    conditioning: PyTree[Array],
) -> tuple[Nodes, Float[Array, "b h w c"]]:
    """Equation (2): DDIM along `times`, in lock-step over the batch, as one `lax.scan`.

    Args:
      denoiser: the guided teacher.
      schedule: the noise schedule.
      z: latents at `times[:, 0]`.
      times: falling times of each path, `[b, k + 1]`; equal neighbours wait.
      conditioning: the denoiser's, leading axis b.

    Returns:
      The k nodes at `times[:, :-1]`, after exactly k calls of `denoiser`, and the latents at
      `times[:, -1]`, where it is not called.
    """

    def advance(z, stop):
        t, s = stop
        eps = denoiser(z, t, conditioning)
        return ddim.step(schedule, z, x0_from_eps(schedule, z, eps, t), t, s), Nodes(z, t, eps)

    z = z.astype(jnp.float32)
    last, nodes = jax.lax.scan(advance, z, (times[:, :-1].T, times[:, 1:].T))
    return nodes, last
