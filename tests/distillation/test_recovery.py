"""Distillation on Gaussian data, where the right answer is known: every objective must find it.

Two answers are compared. The *discrete* one is what the settings ask for: the teacher's steps, as
long as the settings make them, iterated; the student must reach it closely. The *exact* one is the
probability flow itself, from which the discrete one differs by the steps' first-order error.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.support.gaussian_world import world_of
from tests.support.noise import times as times_of
from tlcm_jax.diffusion import gaussian, solvers
from tlcm_jax.diffusion.timesteps import (
    earlier_times,
    milestones,
    segment_lower_bound,
    subdivide,
)
from tlcm_jax.distillation.lcd import LCDSettings
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.distillation.trajectory_kd import TrajectoryKDSettings


def train(world, settings, steps, rate, batch):
    """A few hundred Adam steps from the teacher itself, as one jitted scan."""
    objective = settings.build(world.networks)
    loss = StageLoss(objective)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    conditioning = world.conditioning(batch)

    def update(carry, step):
        trainable, moments = carry
        pair_key, loss_key, data_key = jax.random.split(
            jax.random.fold_in(jax.random.key(0), step), 3
        )
        prompts = {"conditioning": conditioning, "latents": world.latents(data_key, batch)}
        pair_keys = jax.random.split(pair_key, batch)
        pairs = objective.sample_pairs(trainable, world.frozen, prompts, pair_keys)
        loss_keys = jax.random.split(loss_key, len(pairs.z_m))

        def mean_loss(trainable):
            return jnp.mean(loss(trainable, world.frozen, pairs, loss_keys, {})[0])

        updates, moments = optimizer.update(jax.grad(mean_loss)(trainable), moments)
        return (optax.apply_updates(trainable, updates), moments), None

    start = world.trainable()
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(steps))[0])
    return run((start, optimizer.init(start)))[0]


def rms(error):
    return float(jnp.sqrt(jnp.mean(jnp.square(error))))


def teacher_step(world, z, t, s):
    """The guided teacher's step, in closed form."""
    x0 = gaussian.x0(world.process, z, t, world.guided(len(t)))
    return world.process.step(z, x0, t, s)


def segment_jumps(world):
    """Latents at every time, the lower bounds of their segments, and the student's jumps there."""
    process = world.process
    t = jnp.tile(times_of(process, range(1, 1000)), 8)
    lower = segment_lower_bound(process, t, 8)
    z = world.marginal(jax.random.key(7), t)

    def jump(trainable):
        x0 = world.student(trainable, world.frozen)(z, t, world.conditioning(len(t)))
        return process.step(z, x0, t, lower)

    return z, t, lower, jump


@pytest.mark.parametrize(
    ("kind", "rank", "steps", "start", "one_step", "steps_error", "rest"),
    [
        ("eps", 3, 1000, 0.1, 0.015, 0.0055, 0.003),
        # Straighter paths: less is wrong at first, and what is left is learnt more slowly.
        ("flow", 1, 3000, 0.07, 0.006, 0.0016, 0.0015),
    ],
)
def test_stage_1_finds_the_segment_map(kind, rank, steps, start, one_step, steps_error, rest):
    world = world_of(kind, rank)
    settings = MLCDSettings(guidance_scale=world.scale)
    z, t, lower, jump = segment_jumps(world)
    exact = gaussian.flow(world.process, z, t, lower, world.guided(len(t)))
    discrete, now = z, t
    for _ in range(7):  # 125 times in steps of 20
        then = earlier_times(world.process, now, settings.skip, lower)
        discrete, now = teacher_step(world, discrete, now, then), then

    trained = train(world, settings, steps=steps, rate=0.05, batch=16)
    print(
        kind,
        rms(jump(world.trainable()) - exact),
        rms(teacher_step(world, z, t, lower) - exact),
        rms(discrete - exact),
        rms(jump(trained) - discrete),
        rms(jump(trained) - exact),
    )
    assert rms(jump(world.trainable()) - exact) > start
    assert rms(teacher_step(world, z, t, lower) - exact) > one_step
    assert rms(discrete - exact) < steps_error
    assert rms(jump(trained) - discrete) < rest
    assert rms(jump(trained) - exact) < steps_error + 0.0005


def test_jumps_to_any_time_are_the_flow_s_best_average(world):
    """One x0 for all target times s, weighed as the loss weighs them.

    No x0 leads to every point of a curved flow, so a rest stays: it must be the least.
    """
    process = world.process
    settings = MLCDSettings(
        guidance_scale=world.scale, segments=4, points_per_segment=4, target_time="uniform"
    )
    t = jnp.arange(1, 1000)
    z = world.marginal(jax.random.key(7), t)
    lower = segment_lower_bound(process, t, 4)
    span = earlier_times(process, t, settings.skip, lower) - lower
    ends = [lower + (span * share / 8).astype(int) for share in range(9)]
    flow = [gaussian.flow(process, z, t, s, world.guided(len(t))) for s in ends]

    def rest(x0):
        return rms(jnp.stack([process.step(z, x0, t, s) for s in ends]) - jnp.stack(flow))

    # What a step makes of x0: its distances to the flow's points are squares of this times x0's.
    ones, still = jnp.ones_like(z), jnp.zeros_like(z)
    slopes = [process.step(still, ones, t, s) for s in ends]
    leads = [process.inverse_step(z, end, t, s) for end, s in zip(flow, ends, strict=True)]
    weights = jnp.square(jnp.stack(slopes))
    best = jnp.sum(weights * jnp.stack(leads), axis=0) / jnp.sum(weights, axis=0)

    def predicted(trainable):
        return world.student(trainable, world.frozen)(z, t, world.conditioning(len(t)))

    trained = train(world, settings, steps=1000, rate=0.05, batch=16)
    one_step = gaussian.x0(process, z, t, world.guided(len(t)))
    assert rest(predicted(world.trainable())) > 0.12 and rest(one_step) > 0.019
    assert rest(best) < 0.0075
    # Beside it lies the error of the teacher's own steps, 0.0055 as in stage 1's test above.
    assert rest(predicted(trained)) < 0.0095


def test_a_stochastic_teacher_s_mean_is_found_from_noised_data(world):
    """Steps drawn anew each time: what a student can learn of them is where they lead on average.

    On a Gaussian every step is affine, so that the mean goes down the same steps without noise.
    """
    process = world.process
    settings = MLCDSettings(
        guidance_scale=world.scale, mode="data", skip=24, teacher_substeps=3, solver="sde"
    )
    z, t, lower, jump = segment_jumps(world)
    mean, now = z, t
    for _ in range(6):  # 125 times in skips of 24
        then = earlier_times(process, now, settings.skip, lower)
        stops = subdivide(process, now, then, jnp.full_like(now, 3), 3)
        for i in range(3):
            x0 = gaussian.x0(process, mean, stops[:, i], world.guided(len(t)))
            still = jnp.zeros_like(mean)
            mean = solvers.ancestral_step(process, mean, x0, still, stops[:, i], stops[:, i + 1])
        now = then

    # What is left is the noise of the targets: 0.020 with a batch of 256.
    trained = train(world, settings, steps=1000, rate=0.05, batch=1024)
    assert rms(jump(world.trainable()) - mean) > 0.1
    # Not the deterministic flow's end, which is as far away as the noise that was drawn.
    assert rms(gaussian.flow(process, z, t, lower, world.guided(len(t))) - mean) > 0.05
    assert rms(jump(trained) - mean) < 0.01


@pytest.mark.parametrize(
    ("kind", "rank", "settings", "steps", "batch"),
    [
        ("eps", 1, LCDSettings, 400, 64),
        ("flow", 3, LCDSettings, 400, 64),
        ("eps", 3, TrajectoryKDSettings, 200, 16),
        ("flow", 1, TrajectoryKDSettings, 200, 16),
    ],
)
def test_the_endpoint_map_is_found(kind, rank, settings, steps, batch):
    """The student's x0 at the milestones is the end of the teacher's discrete trajectory."""
    world, substeps = world_of(kind, rank), 30
    chosen = settings(guidance_scale=world.scale, teacher_substeps=substeps)
    trained = train(world, chosen, steps=steps, rate=0.1, batch=batch)
    process, edges = world.process, jnp.asarray(milestones(world.process, 8))
    t = jnp.repeat(edges[:-1], 256)
    z = world.marginal(jax.random.key(7), t)

    def end(trainable):
        return world.student(trainable, world.frozen)(z, t, world.conditioning(len(t)))

    exact = gaussian.flow(process, z, t, jnp.full_like(t, process.end), world.guided(len(t)))
    stops = subdivide(process, edges[:-1], edges[1:], jnp.full(8, substeps), substeps)

    def walk(z, stop):
        # Samples that begin below this time wait for the walk to reach them.
        return teacher_step(world, z, *(jnp.minimum(time, t) for time in stop)), None

    pairs = (stops[:, :-1].reshape(-1), stops[:, 1:].reshape(-1))
    discrete = jax.lax.scan(walk, z, pairs)[0]
    print(
        kind,
        settings,
        rms(end(world.trainable()) - exact),
        rms(discrete - exact),
        rms(end(trained) - discrete),
        rms(end(trained) - exact),
    )

    assert rms(end(world.trainable()) - exact) > 0.5
    assert rms(discrete - exact) < 0.007
    assert rms(end(trained) - discrete) < 1e-3
    assert rms(end(trained) - exact) < 0.007
