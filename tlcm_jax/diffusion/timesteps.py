"""Where in time a trajectory stops: milestones, segments, strata, and the student's own tables.

Settings count time in training steps, 0 .. T-1. The axis is cut into M segments by the milestones

    b_k = int(linspace(T-1, 0, M+1)),                                            (1)

for TLCM's M = 8 and T = 1000: 999 874 749 624 499 374 249 124 0, mapped to the process's own
times (`Process.time`). A time t > 0 belongs to the segment with b_lo < t <= b_hi.

Whatever is random has a key for each example, so that neither the batch that an example is drawn
in nor the devices that the batch lies on change it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, Num

from tlcm_jax.diffusion.process import Process

# The authors' inference release: each row a subset of the eight milestones of T = 1000.
STUDENT_TIMESTEPS = {
    1: (999,),
    2: (999, 499),
    3: (999, 499, 124),
    4: (999, 749, 499, 124),
    5: (999, 749, 499, 249, 124),
    6: (999, 749, 499, 374, 249, 124),
    7: (999, 749, 624, 499, 374, 249, 124),
    8: (999, 874, 749, 624, 499, 374, 249, 124),
}


def student_timesteps(steps: int) -> tuple[int, ...]:
    """The training steps at which the student is called, for 1 to 8 steps.

    Raises:
      ValueError: another number of steps.
    """
    if steps not in STUDENT_TIMESTEPS:
        raise ValueError(f"steps = {steps}: a distilled model samples in 1 to 8 steps")
    return STUDENT_TIMESTEPS[steps]


def check_timesteps(process: Process, timesteps: tuple[int, ...], name: str = "timesteps") -> None:
    """Raises a ValueError unless training steps fall strictly, inside the process's time."""
    last = process.num_train_timesteps - 1
    falls = all(t > s for t, s in zip(timesteps, timesteps[1:], strict=False))
    if not timesteps or not falls or timesteps[0] > last or timesteps[-1] < 0:
        raise ValueError(f"{name} = {timesteps}: must fall strictly, inside 0 .. {last}")


def milestone_indices(segments: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """Equation (1): the M + 1 milestones as training steps, falling from T - 1 to 0.

    Raises:
      ValueError: the time axis has not that many segments.
    """
    if not 1 <= segments < num_train_timesteps:
        raise ValueError(
            f"segments = {segments}: a schedule of {num_train_timesteps} times can be cut into"
            f" 1 to {num_train_timesteps - 1} segments"
        )
    return tuple(int(b) for b in np.linspace(num_train_timesteps - 1, 0, segments + 1))


def milestones(process: Process, segments: int) -> Num[np.ndarray, " milestones"]:
    """Equation (1) in the process's own times: M + 1 of them, falling, int32 or float32."""
    times = [process.time(b) for b in milestone_indices(segments, process.num_train_timesteps)]
    return np.asarray(times, process.time_dtype)


def shortest_segment(segments: int, num_train_timesteps: int = 1000) -> int:
    """The number of training steps in the shortest of the M segments."""
    return int(np.min(-np.diff(milestone_indices(segments, num_train_timesteps))))


def segment_lower_bound(process: Process, t: Num[Array, " b"], segments: int) -> Num[Array, " b"]:
    """The lower milestone b_lo < t of each time t > 0."""
    ascending = jnp.asarray(milestones(process, segments)[::-1])
    # Compared with all M + 1 at once: no loop, and nothing for a sharded batch to exchange.
    return ascending[jnp.searchsorted(ascending, t, side="left", method="compare_all") - 1]


def uniform_times(
    process: Process,
    keys: Key[Array, " b"],
    low: Num[Array, " b"],
    high: Num[Array, " b"],
) -> Num[Array, " b"]:
    """Times t ~ U{low .. high}, both ends included, or U[low, high) on a flow; `[b]` keys."""
    if process.discrete:
        return jax.vmap(lambda key, low, high: jax.random.randint(key, (), low, high + 1))(
            keys, low, high
        )
    return low + (high - low) * jax.vmap(jax.random.uniform)(keys)


def earlier_times(
    process: Process, t: Num[Array, " b"], train_steps: int, floor: Num[Array, " b"]
) -> Num[Array, " b"]:
    """The times that many training steps before t, none below its floor."""
    return jnp.maximum(process.earlier(t, train_steps), floor)


def random_times(
    process: Process, keys: Key[Array, " b"], segments: int
) -> tuple[Int[Array, " b"], Num[Array, " b"]]:
    """Draws a segment s ~ U{0 .. M-1}, counted from the clean end, and t ~ U(b_s, b_{s+1}].

    Args:
      process: whose times.
      keys: one for each draw, `[b]`.
      segments: M.

    Returns:
      The segments, int32, and the times.
    """
    segment_keys, time_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    ascending = jnp.asarray(milestones(process, segments)[::-1])
    segment = jax.vmap(lambda key: jax.random.randint(key, (), 0, segments))(segment_keys)
    low, high = ascending[segment], ascending[segment + 1]
    if process.discrete:
        return segment, uniform_times(process, time_keys, low + 1, high)
    return segment, high - (high - low) * jax.vmap(jax.random.uniform)(time_keys)


def stratified_times(
    process: Process, keys: Key[Array, " b"], segments: int, per_segment: int
) -> Num[Array, "b points"]:
    """Random stops of a batch of paths, stratified over the time axis.

    The first is the noisiest time, where sampling begins. Then each segment (b_lo, b_hi] holds
    `per_segment` = N of them,

        t = b_lo + 1 + floor((j + u) / N (b_hi - b_lo)),   j = N-1 .. 0,              (2)

    (on a flow, without the rounding) with one u ~ U[0, 1) a path: each time is as likely as any
    other of its segment, and the points of a path keep their distance.

    Args:
      process: whose times.
      keys: one for each path, `[b]`.
      segments: M.
      per_segment: N, at most the length of the shortest segment.

    Returns:
      Times, falling along the second axis, `[b, M N + 1]`.
    """
    edges = milestones(process, segments)
    high, low = edges[:-1, None], edges[1:, None]
    stratum = np.arange(per_segment)[::-1]
    u = jax.vmap(jax.random.uniform)(keys)[:, None, None]
    if process.discrete:
        offset = jnp.floor((stratum + u) / per_segment * (high - low)).astype(jnp.int32)
        # stratum + u can round up to the next integer in float32.
        inner = jnp.minimum(low + 1 + offset, high)
    else:
        inner = low + (stratum + 1 - u) / per_segment * (high - low)
    inner = inner.reshape(len(keys), segments * per_segment)
    start = jnp.full((len(keys), 1), process.start, inner.dtype)
    return jnp.concatenate([start, inner], axis=1)


def subdivide(
    process: Process,
    start: Num[Array, " b"],
    end: Num[Array, " b"],
    steps: Int[Array, " b"],
    length: int,
) -> Num[Array, "b stops"]:
    """Each path's own number of equal steps from `start` down to `end`, padded at its end.

    Args:
      process: whose times.
      start: first time of each path.
      end: last time of each path, at most `start`.
      steps: number of equal steps of each path, in 1 .. `length`.
      length: number of steps in the result; a path of fewer repeats `end`, where a step is the
        identity.

    Returns:
      Times, `[b, length + 1]`, whose ends are exact and whose inner stops are rounded up.
    """
    done = jnp.minimum(jnp.arange(length + 1), steps[:, None])
    if process.discrete:
        return start[:, None] - (start - end)[:, None] * done // steps[:, None]
    inner = start[:, None] - (start - end)[:, None] * (done / steps[:, None])
    return jnp.where(done == steps[:, None], end[:, None], inner)
