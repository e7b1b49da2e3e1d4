"""Distillation on Gaussian data, where the right answer is known: every objective must find it.

Two answers are compared. The *discrete* one is what the settings ask for: the teacher's DDIM with
the settings' own steps, iterated; the student must reach it closely. The *exact* one is the
probability flow itself, from which the discrete one differs by DDIM's first-order error.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
import pytest
from tlcm_jax.diffusion.prediction import predict_x0

from tlcm_jax.diffusion import ddim, gaussian, solvers
from tlcm_jax.diffusion import trajectories as paths
from tlcm_jax.distillation import lcd as endpoints
from tlcm_jax.distillation import mlcd as consistency
from tlcm_jax.distillation import trajectory_kd as trajectories


def train(world, objective, steps, rate, batch):
    """A few hundred Adam steps from the teacher itself, as one jitted scan."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    conditioning = world.conditioning(batch)

    def update(carry, step):
        trainable, moments = carry
        produce_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
        real = world.latents(jax.random.fold_in(produce_key, 0), batch)
        prompts = {"conditioning": conditioning, "latents": real}
        examples = objective.produce(trainable, world.frozen, prompts, produce_key)

        def mean_loss(trainable):
            return jnp.mean(objective.loss(trainable, world.frozen, examples, loss_key)[0])

        updates, moments = optimizer.update(jax.grad(mean_loss)(trainable), moments)
        return (optax.apply_updates(trainable, updates), moments), None

    start = world.trainable()
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(steps))[0])
    return run((start, optimizer.init(start)))[0]


def rms(error):
    return float(jnp.sqrt(jnp.mean(jnp.square(error))))


def teacher_step(world, z, t, s):
    """DDIM with the guided teacher, in closed form."""
    x0 = gaussian.x0(world.schedule, z, t, world.guided(len(t)))
    return ddim.step(world.schedule, z, x0, t, s)


def segment_jumps(world):
    """Latents at every time, the floors of their segments, and the student's jumps to these."""
    t = jnp.tile(jnp.arange(1, 1000), 8)
    floor = paths.segment_floor(t, 8)
    z = world.marginal(jax.random.key(7), t)

    def jump(trainable):
        student = world.student(trainable, world.frozen)
        x0 = predict_x0(student, world.schedule, z, t, world.conditioning(len(t)))
        return ddim.step(world.schedule, z, x0, t, floor)

    return z, t, floor, jump


def test_stage_1_finds_the_segment_map(world):
    settings = consistency.SegmentConsistencySettings(guidance_scale=world.scale)
    objective = consistency.segment_consistency(
        world.networks, world.schedule, world.shape, settings
    )
    z, t, floor, jump = segment_jumps(world)
    exact = gaussian.flow(world.schedule, z, t, floor, world.guided(len(t)))
    discrete, now = z, t
    for _ in range(7):  # 125 times in steps of 20
        then = jnp.maximum(now - settings.skip, floor)
        discrete, now = teacher_step(world, discrete, now, then), then

    trained = train(world, objective, steps=1000, rate=0.05, batch=16)
    assert rms(jump(world.trainable()) - exact) > 0.1
    assert rms(teacher_step(world, z, t, floor) - exact) > 0.015
    assert rms(discrete - exact) < 0.0055
    assert rms(jump(trained) - discrete) < 0.003
    assert rms(jump(trained) - exact) < 0.006


def test_jumps_to_any_time_are_the_flow_s_best_average(world):
    """One x0 for all landings s, weighed as the loss weighs them.

    No x0 leads to every point of a curved flow, so a rest stays: it must be the least.
    """
    settings = consistency.SegmentConsistencySettings(
        guidance_scale=world.scale, segments=4, nodes_per_segment=4, landing="trajectory"
    )
    objective = consistency.segment_consistency(
        world.networks, world.schedule, world.shape, settings
    )
    t = jnp.arange(1, 1000)
    z = world.marginal(jax.random.key(7), t)
    floor = paths.segment_floor(t, 4)
    span = jnp.maximum(t - settings.skip, floor) - floor
    landings = [floor + (span * share / 8).astype(int) for share in range(9)]
    flow = [gaussian.flow(world.schedule, z, t, s, world.guided(len(t))) for s in landings]

    def rest(x0):
        return rms(
            jnp.stack([ddim.step(world.schedule, z, x0, t, s) for s in landings]) - jnp.stack(flow)
        )

    # What a step makes of x0: its distances to the flow's points are squares of this times x0's.
    ones, still = jnp.ones_like(z), jnp.zeros_like(z)
    slopes = [ddim.step(world.schedule, still, ones, t, s) for s in landings]
    leads = [
        ddim.inverse(world.schedule, z, end, t, s) for end, s in zip(flow, landings, strict=True)
    ]
    weights = jnp.square(jnp.stack(slopes))
    best = jnp.sum(weights * jnp.stack(leads), axis=0) / jnp.sum(weights, axis=0)

    def predicted(trainable):
        student = world.student(trainable, world.frozen)
        return predict_x0(student, world.schedule, z, t, world.conditioning(len(t)))

    trained = train(world, objective, steps=1000, rate=0.05, batch=16)
    one_step = gaussian.x0(world.schedule, z, t, world.guided(len(t)))
    assert rest(predicted(world.trainable())) > 0.12 and rest(one_step) > 0.019
    assert rest(best) < 0.0075
    # Beside it lies the error of the teacher's own steps, 0.0055 as in stage 1's test above.
    assert rest(predicted(trained)) < 0.0095


def test_a_stochastic_teacher_s_mean_is_found_from_noised_data(world):
    """Steps drawn anew each time: what a student can learn of them is where they lead on average.

    On a Gaussian every step is affine, so that the mean goes down the same steps without noise.
    """
    settings = consistency.SegmentConsistencySettings(
        guidance_scale=world.scale, mode="data", skip=24, teacher_substeps=3, solver="sde"
    )
    objective = consistency.segment_consistency(
        world.networks, world.schedule, world.shape, settings
    )
    z, t, floor, jump = segment_jumps(world)
    mean, now = z, t
    for _ in range(6):  # 125 times in skips of 24
        then = jnp.maximum(now - settings.skip, floor)
        stops = paths.equal_times(now, then, jnp.full_like(now, 3), 3)
        for i in range(3):
            x0 = gaussian.x0(world.schedule, mean, stops[:, i], world.guided(len(t)))
            still = jnp.zeros_like(mean)
            mean = solvers.ancestral_step(
                world.schedule, mean, x0, still, stops[:, i], stops[:, i + 1]
            )
        now = then

    # What is left is the noise of the targets: 0.020 with a batch of 256.
    trained = train(world, objective, steps=1000, rate=0.05, batch=1024)
    assert rms(jump(world.trainable()) - mean) > 0.1
    # Not the deterministic flow's end, which is as far away as the noise that was drawn.
    assert rms(gaussian.flow(world.schedule, z, t, floor, world.guided(len(t))) - mean) > 0.05
    assert rms(jump(trained) - mean) < 0.01


@pytest.mark.parametrize(
    ("module", "kind", "build", "substeps", "steps", "batch"),
    [
        (endpoints, "EndpointConsistencySettings", "endpoint_consistency", 30, 400, 64),
        (trajectories, "TrajectoryRegressionSettings", "trajectory_regression", 30, 200, 16),
    ],
)
def test_the_endpoint_map_is_found(world, module, kind, build, substeps, steps, batch):
    settings = getattr(module, kind)(guidance_scale=world.scale, teacher_substeps=substeps)
    objective = getattr(module, build)(world.networks, world.schedule, world.shape, settings)
    trained = train(world, objective, steps=steps, rate=0.1, batch=batch)
    check_endpoints(world, trained, substeps)


def check_endpoints(world, trained, substeps):
    """The student's x0 at the milestones is the end of the teacher's discrete trajectory."""
    edges = paths.milestones(8)
    t = jnp.repeat(jnp.asarray(edges[:-1]), 256)
    z = world.marginal(jax.random.key(7), t)

    def end(trainable):
        student = world.student(trainable, world.frozen)
        return predict_x0(student, world.schedule, z, t, world.conditioning(len(t)))

    exact = gaussian.flow(world.schedule, z, t, jnp.zeros_like(t), world.guided(len(t)))
    steps = jnp.arange(substeps + 1)
    stops = jnp.concatenate(
        [high - (high - low) * steps // substeps for high, low in pairwise(edges)]
    )

    def walk(z, stop):
        # Samples that begin below this time wait for the walk to reach them.
        return teacher_step(world, z, *(jnp.minimum(time, t) for time in stop)), None

    discrete = jax.lax.scan(walk, z, (stops[:-1], stops[1:]))[0]

    assert rms(end(world.trainable()) - exact) > 0.5
    assert rms(discrete - exact) < 0.007
    assert rms(end(trained) - discrete) < 1e-3
    assert rms(end(trained) - exact) < 0.007
