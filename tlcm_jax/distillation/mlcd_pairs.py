"""The pairs of stage 1: where z_m comes from, and how the teacher goes on from it to z_n.

Four ways to come by a state inside a segment (`mode`):

* *node_reuse*: one teacher path from noise visits points in every segment, and each is a state.
  The teacher's x0 there gives both the path's next jump and, by arithmetic alone, the pair: K
  points cost K guided calls and make K pairs;
* *paper*: a state is the end of a path of its own, in a step a segment;
* *one_step_state*: a state is one step away from noise, wherever it lies, as in the first rows of
  the paper's ablation;
* *data*: real latents, noised, as in the related methods that have images. No path is walked.

From z_m the teacher walks to t_n in p equal sub-steps, by one of three solvers: *ddim*; *addim*,
DDIM adjusted for what its prediction averages over (solvers.py, equation 1), whose variance is
that of the real latents about the conditional prediction; *sde*, ancestral sampling (equation 2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PyTree

from tlcm_jax.diffusion import solvers, timesteps
from tlcm_jax.diffusion.guidance import guided_and_plain
from tlcm_jax.diffusion.process import Process
from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.diffusion.trajectories import teacher_path
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.networks import Frozen, Networks
from tlcm_jax.distillation.objective import Pairs, batch_size, repeat, split

MODES = ("node_reuse", "paper", "one_step_state", "data")
SOLVERS = ("ddim", "addim", "sde")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How the pairs of stage 1 are made.

    Attributes:
      segments: M; 8 in the paper.
      skip: t_m - t_n, in training steps; 20 in the paper.
      teacher_substeps: p, the teacher's steps over the skip; 1 in the paper.
      solver: "ddim", the paper's, "addim" (in mode "data") or "sde".
      guidance_scale: w of the teacher, fixed; 8 in the paper.
      mode: "node_reuse", ours, or "paper"; "one_step_state", the first rows of its ablation; or
        "data", noised real latents, which the batches must then hold. A path of the mode "paper"
        has M steps: below 8 segments the teacher is far off its trajectory (docs/results.md).
      points_per_segment: of a path, with node reuse; 1 is the paper's step length. More lie closer
        to the true ODE at the same cost a pair, for fewer prompts in a batch of pairs
        (docs/method.md).
      target_time: where jumps end: "milestone", the paper's, or "uniform", at any time between.
    """

    segments: int = 8
    skip: int = 20
    teacher_substeps: int = 1
    solver: str = "ddim"
    guidance_scale: float = 8.0
    mode: str = "node_reuse"
    points_per_segment: int = 2
    target_time: str = "milestone"


def sample_mlcd_pairs(
    networks: Networks,
    options: PairOptions,
    frozen: Frozen,
    batch: Mapping[str, Any],
    keys: Key[Array, " b"],
) -> Pairs:
    """Pairs of stage 1, without gradients.

    Args:
      networks: teacher and null conditioning.
      options: the choices.
      frozen: their parameters.
      batch: `{"conditioning": pytree [b, ...]}`, and "latents" in mode "data".
      keys: one for each prompt, `[b]`.

    Returns:
      K pairs a prompt with node reuse, else one.
    """
    process, conditioning = networks.process, batch["conditioning"]
    noise_keys, time_keys, target_keys, walk_keys = split(keys, 4)
    ask = guided_and_plain(
        networks.teacher(frozen), options.guidance_scale, networks.null_of(frozen)
    )
    data = None
    if options.mode == "data":
        data = batch["latents"].astype(jnp.float32)
        _, t = timesteps.random_times(process, time_keys, options.segments)
        z = process.add_noise(data, normal(noise_keys, data.shape[1:]), t)
        x0, plain = ask(z, t, conditioning)
    else:
        z, t, x0 = _path_states(networks, options, frozen, conditioning, noise_keys, time_keys)
        plain, copies = x0, len(t) // batch_size(conditioning)
        conditioning = repeat(conditioning, copies)
        target_keys, walk_keys = (_spread(each, copies) for each in (target_keys, walk_keys))
    lower = timesteps.segment_lower_bound(process, t, options.segments)
    t_n = timesteps.earlier_times(process, t, options.skip, lower)
    substeps = options.teacher_substeps
    stops = timesteps.subdivide(process, t, t_n, jnp.full(t.shape, substeps, jnp.int32), substeps)
    step_keys = jnp.stack(split(walk_keys, substeps))
    solver = options.solver
    z_n = solver_step(process, solver, z, x0, plain, stops[:, 0], stops[:, 1], data, step_keys[0])

    def further(z: Array, xs: tuple) -> tuple[Array, None]:
        now, then, keys = xs
        x0, plain = ask(z, now, conditioning)
        return solver_step(process, solver, z, x0, plain, now, then, data, keys), None

    if substeps > 1:
        z_n, _ = jax.lax.scan(further, z_n, (stops[:, 1:-1].T, stops[:, 2:].T, step_keys[1:]))
    target_time = lower
    if options.target_time == "uniform":
        target_time = timesteps.uniform_times(process, target_keys, lower, t_n)
    return jax.lax.stop_gradient(Pairs(z, t, z_n, t_n, target_time, data, conditioning))


def _path_states(
    networks: Networks,
    options: PairOptions,
    frozen: Frozen,
    conditioning: PyTree[Array],
    noise_keys: Key[Array, " b"],
    time_keys: Key[Array, " b"],
) -> tuple[Float[Array, " n *latent"], Num[Array, " n"], Float[Array, " n *latent"]]:
    """Latents on the teacher's own paths, their times, and the guided x0 there."""
    process, segments = networks.process, options.segments
    noise = normal(noise_keys, networks.latent_shape)
    if options.mode == "paper":
        times = paper_times(process, time_keys, segments)
    elif options.mode == "one_step_state":
        _, t_m = timesteps.random_times(process, time_keys, segments)
        times = jnp.stack([jnp.full_like(t_m, process.start), t_m], axis=1)
    else:
        times = timesteps.stratified_times(process, time_keys, segments, options.points_per_segment)
    teacher = networks.guided_teacher(frozen, options.guidance_scale)
    # A path ends where its last point is: nothing is asked beyond it.
    stops = jnp.concatenate([times, times[:, -1:]], axis=1)
    points, _ = teacher_path(teacher, process, noise, stops, conditioning)
    if options.mode != "node_reuse":
        points = jax.tree.map(lambda leaf: leaf[-1:], points)
    # Batch-major, so that merging the time axis keeps a sample's pairs on its own device.
    z, t, x0 = (jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]) for leaf in points)
    return z, t, x0


def paper_times(process: Process, keys: Key[Array, " b"], segments: int) -> Num[Array, "b stops"]:
    """The paper's paths: to a random t_m, in as many equal steps as segments lie above its bound.

    A segment s and t_m inside it (`timesteps.random_times`), reached from the noisiest time in
    M - s steps.

    Returns:
      Times, `[b, M + 1]`, of which the last is t_m; shorter paths are padded with it.
    """
    segment, t_m = timesteps.random_times(process, keys, segments)
    start = jnp.full_like(t_m, process.start)
    return timesteps.subdivide(process, start, t_m, segments - segment, segments)


def solver_step(
    process: Process,
    solver: str,
    z: Float[Array, " n *latent"],
    x0: Float[Array, " n *latent"],
    plain: Float[Array, " n *latent"],
    t: Num[Array, " n"],
    s: Num[Array, " n"],
    data: Float[Array, " n *latent"] | None,
    keys: Key[Array, " n"],
) -> Float[Array, " n *latent"]:
    """One sub-step of the teacher, whose guided and conditional x0 are given."""
    if solver == "sde":
        return solvers.ancestral_step(process, z, x0, normal(keys, z.shape[1:]), t, s)
    if solver == "addim" and data is not None:
        return solvers.adjusted_step(process, z, x0, losses.mse(data, plain), t, s)
    return process.step(z, x0, t, s)


def _spread(keys: Key[Array, " b"], copies: int) -> Key[Array, " n"]:
    """Keys for the `copies` pairs of each prompt, side by side: `[b]` to `[b * copies]`."""
    return jax.vmap(lambda key: jax.random.split(key, copies))(keys).reshape(-1)
