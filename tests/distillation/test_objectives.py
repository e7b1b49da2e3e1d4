"""What both stages promise: where gradients stop, what a sample costs, how they shard."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tlcm_jax.diffusion.prediction import predict_x0

from tlcm_jax.diffusion import ddim
from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.lcd import EndpointConsistencySettings
from tlcm_jax.distillation.mlcd import SegmentConsistencySettings
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import batch_size
from tlcm_jax.distillation.trajectory_kd import TrajectoryRegressionSettings

CASES = {
    "node_reuse": SegmentConsistencySettings(),
    "one_node": SegmentConsistencySettings(nodes_per_segment=1, segments=4),
    "literal": SegmentConsistencySettings(mode="literal"),
    "single_step": SegmentConsistencySettings(mode="single_step"),
    "data": SegmentConsistencySettings(mode="data", skip=24, teacher_substeps=3, solver="sde"),
    "finer": SegmentConsistencySettings(nodes_per_segment=1, teacher_substeps=2),
    "endpoint": EndpointConsistencySettings(),
    "shared_rollout": EndpointConsistencySettings(states_per_rollout=2),
    "milestones": EndpointConsistencySettings(rollout="milestones", teacher_substeps=2),
    "trajectory": TrajectoryRegressionSettings(),
    "whole_path": TrajectoryRegressionSettings(segments=50, teacher_substeps=1),
}


def batch_of(world, size):
    return {
        "conditioning": world.conditioning(size),
        "latents": world.latents(jax.random.key(9), size),
    }


def stage_of(settings):
    return next(name for name, stage in stages.STAGES.items() if type(settings) is stage.settings)


def build(world, settings, networks=None):
    networks = networks or world.networks
    return stages.build(stage_of(settings), networks, world.schedule, world.shape, settings)


def in_frozen(world):
    """The world's networks with every role reading the frozen parameters."""

    def scaled(network):
        return lambda frozen: lambda z, t, c: frozen["scale"] * network(z, t, c)

    return Networks(
        student=lambda trainable, frozen: scaled(world.student(trainable, None))(frozen),
        teacher=scaled(world.networks.teacher(None)),
        null=lambda frozen: frozen["null"],
    ), {"scale": jnp.ones(()), "null": world.frozen}


@pytest.mark.parametrize(
    "case", ["node_reuse", "literal", "data", "shared_rollout", "milestones", "trajectory"]
)
def test_no_gradient_reaches_teacher_states_or_rollout(world, case):
    """The whole of `produce` is constant in the parameters of every network that it runs."""
    networks, frozen = in_frozen(world)
    objective = build(world, CASES[case], networks)
    batch = batch_of(world, 2)

    def total(trainable, frozen):
        examples = objective.produce(trainable, frozen, batch, jax.random.key(0))
        floats = [x for x in jax.tree.leaves(examples) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x) for x in floats)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(world.trainable(), frozen)
    assert all(not jnp.any(g) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("case", ["node_reuse", "endpoint"])
def test_no_gradient_reaches_the_target(world, case):
    """For a student eps + theta the gradient is closed-form: the prediction's own, and no more."""

    def shifted(trainable, frozen):
        return lambda z, t, c: world.networks.teacher(frozen)(z, t, c) + trainable

    schedule = world.schedule
    objective = build(world, CASES[case], dataclasses.replace(world.networks, student=shifted))
    theta, key = jnp.float32(0.1), jax.random.key(0)
    pairs = objective.produce(theta, world.frozen, {"conditioning": world.conditioning(4)}, key)

    def loss(theta, z_m, z_n):
        here = pairs._replace(z_m=z_m, z_n=z_n)
        return jnp.mean(objective.loss(theta, None, here, key)[0])

    found, by_z_m, by_z_n = jax.grad(loss, argnums=(0, 1, 2))(theta, pairs.z_m, pairs.z_n)

    student = shifted(theta, None)
    prediction = predict_x0(student, schedule, pairs.z_m, pairs.t_m, pairs.conditioning)
    goal = predict_x0(student, schedule, pairs.z_n, pairs.t_n, pairs.conditioning)
    slope = -schedule.sigma(pairs.t_m) / schedule.alpha(pairs.t_m)  # of x0 in theta
    floor = jnp.zeros_like(pairs.t_n)
    if case == "node_reuse":
        floor = pairs.boundary
        prediction = ddim.step(schedule, pairs.z_m, prediction, pairs.t_m, floor)
        goal = ddim.step(schedule, pairs.z_n, goal, pairs.t_n, floor)
        slope *= ddim.coefficients(schedule, pairs.t_m, floor)[1]
    goal = jnp.where((pairs.t_n == floor)[:, None, None, None], pairs.z_n, goal)
    np.testing.assert_allclose(found, jnp.mean(2 * (prediction - goal) * slope), rtol=1e-4)
    assert jnp.any(by_z_m)
    assert not jnp.any(by_z_n)


@pytest.mark.parametrize("case", CASES)
def test_network_evaluations_are_those_stated(world, case):
    settings = CASES[case]
    stage = stages.find(stage_of(settings))
    forwards = Counter()

    def counted(role, network):
        def denoise(z, t, conditioning):
            jax.debug.callback(lambda: forwards.update({role: z.shape[0]}))
            return network(z, t, conditioning)

        return denoise

    networks = Networks(
        student=lambda trainable, frozen: counted("student", world.student(trainable, frozen)),
        teacher=lambda frozen: counted("teacher", world.networks.teacher(frozen)),
        null=world.networks.null,
    )
    objective = build(world, settings, networks)
    trainable, key = world.trainable(), jax.random.key(0)

    batch = batch_of(world, 2)
    pairs = jax.jit(objective.produce)(trainable, world.frozen, batch, key)
    jax.effects_barrier()
    produced = Counter(forwards)
    jax.block_until_ready(
        jax.jit(
            jax.value_and_grad(lambda x: jnp.sum(objective.loss(x, world.frozen, pairs, key)[0]))
        )(trainable)
    )
    jax.effects_barrier()
    forwards.subtract(produced)

    samples = batch_size(pairs)
    stated = stage.evaluations_per_sample(settings)
    assert samples == 2 * stage.examples_per_prompt(settings)
    assert produced["teacher"] == stated.teacher * samples
    assert produced["student"] == stated.rollout * samples
    assert forwards["student"] == (stated.target + stated.student) * samples
    assert forwards["teacher"] == 0


def test_the_stated_costs():
    """Two teacher forwards a pair with node reuse, 18 with the literal path."""
    costs = {
        case: stages.find(stage_of(s)).evaluations_per_sample(s).total for case, s in CASES.items()
    }
    assert costs["node_reuse"] == costs["one_node"] == 2 + 2
    assert costs["literal"] == 18 + 2
    assert costs["single_step"] == 4 + 2
    assert costs["data"] == 6 + 2
    assert costs["finer"] == 4 + 2
    assert costs["endpoint"] == 4 + 6 + 2
    assert costs["shared_rollout"] == 2 + 6 + 2
    assert costs["milestones"] == 8 + 4 + 2
    assert costs["trajectory"] == 4 + 1
    assert costs["whole_path"] == 2 + 1
    # Seen three times, an example is made once.
    thrice = stages.evaluations("endpoint_consistency", CASES["endpoint"], epochs=3)
    assert (thrice.rollout, thrice.teacher, thrice.target, thrice.student) == (4, 6, 3, 3)


@pytest.mark.parametrize("case", ["node_reuse", "literal", "data", "shared_rollout", "trajectory"])
def test_examples_are_made_where_their_prompts_are(world, case):
    """On eight devices: equal to one device's, and no latent crosses between devices."""
    objective = build(world, CASES[case])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    batch = batch_of(world, 16)
    arguments = (world.trainable(), world.frozen, batch, jax.random.key(0))

    single = jax.jit(objective.produce)(*arguments)
    produce = (
        jax.jit(
            objective.produce,
            in_shardings=(whole, whole, by_sample, whole),
            out_shardings=by_sample,
        )
        .lower(*arguments)
        .compile()
    )
    sharded = produce(*jax.device_put(arguments, (whole, whole, by_sample, whole)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), single, sharded)
    text = produce.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text


def test_a_training_step_s_examples_depend_on_the_key_alone(world):
    objective = build(world, CASES["shared_rollout"])
    batch = batch_of(world, 2)
    make = jax.jit(lambda key: objective.produce(world.trainable(), world.frozen, batch, key))
    first, again, other = make(jax.random.key(1)), make(jax.random.key(1)), make(jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.any(np.asarray(first.z_m) == np.asarray(other.z_m))
