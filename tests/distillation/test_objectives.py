"""What all objectives promise: where gradients stop, what a pair costs, its keys, its device."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.support.gaussian_world import keys, world_of
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.distillation.lcd import LCDSettings
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import NFE, drop_prompts
from tlcm_jax.distillation.terms.compose import StageLoss
from tlcm_jax.distillation.trajectory_kd import TrajectoryKDSettings

CASES = {
    "node_reuse": MLCDSettings(),
    "one_point": MLCDSettings(points_per_segment=1, segments=4),
    "paper": MLCDSettings(mode="paper"),
    "one_step_state": MLCDSettings(mode="one_step_state"),
    "data": MLCDSettings(mode="data", skip=24, teacher_substeps=3, solver="sde"),
    "finer": MLCDSettings(points_per_segment=1, teacher_substeps=2, target_time="uniform"),
    "lcd": LCDSettings(),
    "shared_rollout": LCDSettings(states_per_rollout=2),
    "milestones": LCDSettings(rollout="milestones", teacher_substeps=2),
    "terms_alone": LCDSettings(weight=0.0),
    "trajectory": TrajectoryKDSettings(),
    "whole_path": TrajectoryKDSettings(segments=50, teacher_substeps=1),
    "own_states": TrajectoryKDSettings(own_states=0.5),
}


def build(world, settings, student=None):
    if student is None:
        return settings.build(world.networks)
    return settings.build(dataclasses.replace(world.networks, student=student))


def disturbed(tree):
    return jax.tree.map(lambda x: x + 0.1, tree)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("node_reuse", "eps"), ("paper", "eps"), ("data", "eps"), ("shared_rollout", "eps"),
        ("milestones", "eps"), ("own_states", "eps"), ("finer", "flow"), ("lcd", "flow"),
    ],
)  # fmt: skip
def test_no_gradient_reaches_teacher_states_or_rollout(case, kind):
    """All of `sample_pairs` is constant in the parameters of every network that it runs."""
    world = world_of(kind, 3)
    objective = build(world, CASES[case])
    batch = world.batch(2)

    @jax.jit
    def with_slopes(trainable, frozen):
        def total(trainable, frozen):
            pairs = objective.sample_pairs(trainable, frozen, batch, keys(0, 2))
            floats = [x for x in jax.tree.leaves(pairs) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(jnp.sum(x) for x in floats)

        return jax.value_and_grad(total, argnums=(0, 1))(trainable, frozen)

    value, gradients = with_slopes(world.trainable(), world.frozen)
    assert np.isfinite(value)
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))
    # And yet pairs are what those parameters make.
    moved, _ = with_slopes(disturbed(world.trainable()), world.frozen)
    assert (moved != value) == objective.uses_student
    led, _ = with_slopes(world.trainable(), {**world.frozen, "scale": jnp.float32(1.1)})
    assert led != value


@pytest.mark.parametrize("case", ["node_reuse", "lcd"])
def test_no_gradient_reaches_the_target(any_world, case):
    """For a student x0 + theta the gradient is closed-form: the prediction's own, and no more."""
    world, process = any_world, any_world.process

    def shifted(trainable, frozen):
        return lambda z, t, c: world.teacher(world.frozen)(z, t, c) + trainable["shift"]

    objective = build(world, CASES[case], shifted)
    theta = {"shift": jnp.float32(0.1)}
    pairs = world.pairs(objective, 4, trainable=theta)

    def loss(theta, frozen, z_m, z_n):
        here = pairs._replace(z_m=z_m, z_n=z_n)
        return jnp.mean(StageLoss(objective)(theta, frozen, here, keys(0, len(z_m)), {})[0])

    found, by_frozen, by_z_m, by_z_n = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(
        theta, world.frozen, pairs.z_m, pairs.z_n
    )

    student = shifted(theta, None)
    prediction = student(pairs.z_m, pairs.t_m, pairs.conditioning)
    target = student(pairs.z_n, pairs.t_n, pairs.conditioning)
    slope, end = jnp.ones_like(prediction), jnp.full_like(pairs.t_n, process.end)
    if case == "node_reuse":
        end = pairs.target_time
        prediction = process.step(pairs.z_m, prediction, pairs.t_m, end)
        target = process.step(pairs.z_n, target, pairs.t_n, end)
        slope = bcast_right(process.coefficients(pairs.t_m, end)[1], target)
    target = jnp.where(bcast_right(pairs.t_n == end, target), pairs.z_n, target)
    expected = jnp.mean(2 * (prediction - target) * slope)
    np.testing.assert_allclose(found["shift"], expected, rtol=1e-4)
    assert jnp.any(by_z_m)
    assert not jnp.any(by_z_n)
    assert not any(jnp.any(g) for g in jax.tree.leaves(by_frozen))


@pytest.mark.parametrize("case", CASES)
def test_network_forwards_are_those_stated(world, case):
    forwards = Counter()

    def counted(role, network):
        def denoise(z, t, conditioning):
            jax.debug.callback(lambda: forwards.update({role: z.shape[0]}))
            return network(z, t, conditioning)

        return denoise

    networks = Networks(
        process=world.process,
        latent_shape=world.shape,
        student=lambda trainable, frozen: counted("student", world.student(trainable, frozen)),
        inference=lambda trainable, frozen: counted("target", world.student(trainable, frozen)),
        teacher=lambda frozen: counted("teacher", world.teacher(frozen)),
        null_of=world.networks.null_of,
    )
    objective = CASES[case].build(networks)
    pairs = world.pairs(objective, 2)
    jax.effects_barrier()
    sampled = Counter(forwards)

    def total(trainable):
        return jnp.sum(objective_loss(trainable, objective, world, pairs))

    jax.block_until_ready(jax.jit(jax.value_and_grad(total))(world.trainable()))
    jax.effects_barrier()
    forwards.subtract(sampled)

    count, stated = len(pairs.z_m), objective.nfe_per_pair
    assert count == 2 * objective.pairs_per_prompt
    assert sampled["teacher"] == stated.teacher * count
    assert sampled["target"] == stated.rollout * count
    assert sampled["student"] == 0
    assert forwards["student"] == stated.student * count
    assert forwards["target"] == stated.target * count
    assert forwards["teacher"] == 0


def objective_loss(trainable, objective, world, pairs):
    """As `StageLoss` has it, which refuses an objective that asks nothing of its own."""
    networks = objective.networks
    target = objective.target(networks.target(trainable, world.frozen), pairs)
    x0 = objective.predict(networks.student(trainable, world.frozen), pairs)
    return objective.loss(x0, target, pairs)[0] + 0 * jnp.sum(x0)


def test_the_stated_costs(world):
    """Two teacher forwards a pair with node reuse, 18 with the paper's path."""
    costs = {case: build(world, chosen).nfe_per_pair for case, chosen in CASES.items()}
    totals = {case: cost.total for case, cost in costs.items()}
    assert totals["node_reuse"] == totals["one_point"] == 2 + 2
    assert totals["paper"] == 18 + 2
    assert totals["one_step_state"] == 4 + 2
    assert totals["data"] == 6 + 2
    assert totals["finer"] == 4 + 2
    assert totals["lcd"] == 4 + 6 + 2
    assert totals["shared_rollout"] == 2 + 6 + 2
    assert totals["milestones"] == 8 + 4 + 2
    assert totals["terms_alone"] == 4 + 1
    assert totals["trajectory"] == 4 + 1
    assert totals["whole_path"] == 2 + 1
    assert totals["own_states"] == 0.5 + 4 + 1
    # Seen three times, a pair is made once.
    assert costs["lcd"].visited(3) == NFE(rollout=4.0, teacher=6.0, target=3.0, student=3.0)
    assert costs["lcd"].visited(3) + NFE(aux=2.0) == NFE(
        rollout=4.0, teacher=6.0, target=3.0, student=3.0, aux=2.0
    )


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("node_reuse", "eps"), ("paper", "flow"), ("data", "eps"), ("finer", "flow"),
        ("shared_rollout", "eps"), ("own_states", "flow"),
    ],
)  # fmt: skip
def test_a_prompt_s_pairs_are_its_own_whatever_batch_it_is_in(case, kind):
    """To the last bit."""
    world = world_of(kind, 1)
    objective = build(world, CASES[case])
    batch = {**world.batch(4), "conditioning": world.different(4)}
    theta = disturbed(world.trainable())
    sample = jax.jit(objective.sample_pairs)
    whole = sample(theta, world.frozen, batch, keys(3, 4))
    halves = [
        sample(theta, world.frozen, *jax.tree.map(lambda x, i=i: x[i : i + 2], (batch, keys(3, 4))))
        for i in (0, 2)
    ]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *halves)
    for name, one, two in zip(whole._fields, whole, joined, strict=True):
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_array_equal(a, b, err_msg=name), one, two
        )


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("node_reuse", "eps"), ("paper", "eps"), ("data", "eps"), ("shared_rollout", "eps"),
        ("own_states", "eps"), ("finer", "flow"), ("lcd", "flow"),
    ],
)  # fmt: skip
def test_pairs_are_made_where_their_prompts_are(case, kind):
    """On eight devices: one device's to the last bit, and no latent crosses between devices."""
    world = world_of(kind, 3)
    objective = build(world, CASES[case])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = (world.trainable(), world.frozen, world.batch(16), keys(0, 16))
    places = (whole, whole, by_sample, by_sample)

    single = jax.jit(objective.sample_pairs)(*arguments)
    sample = (
        jax.jit(objective.sample_pairs, in_shardings=places, out_shardings=by_sample)
        .lower(*arguments)
        .compile()
    )
    sharded = sample(*jax.device_put(arguments, places))
    jax.tree.map(np.testing.assert_array_equal, single, sharded)
    text = sample.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text


def test_pairs_depend_on_the_keys_alone(world):
    objective = build(world, CASES["shared_rollout"])
    first, again, other = (world.pairs(objective, 2, seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.any(np.asarray(first.z_m) == np.asarray(other.z_m))


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "v-zero-snr") for case in ("node_reuse", "paper", "data", "finer", "lcd", "own_states")]
    + [(case, "flow") for case in ("node_reuse", "data", "lcd", "trajectory")],
)
def test_all_is_finite_up_to_pure_noise(case, kind):
    """v-prediction, zero terminal SNR, where alpha is 0 at the start; and a flow, at both ends."""
    world = world_of(kind, 3)
    process = world.process

    def from_raw(denoiser):
        """The network as its checkpoint would have it: v, or a velocity."""

        def denoise(z, t, conditioning):
            x0 = denoiser(z, t, conditioning)
            eps = process.to_eps(z, x0, t)
            alpha, sigma = (bcast_right(level(t), z) for level in (process.alpha, process.sigma))
            raw = alpha * eps - sigma * x0 if process.discrete else eps - x0
            return process.to_x0(raw, z, t)

        return denoise

    networks = dataclasses.replace(
        world.networks,
        teacher=lambda frozen: from_raw(world.teacher(frozen)),
        student=lambda theta, frozen: from_raw(world.student(theta, frozen)),
    )
    theta, objective = disturbed(world.trainable()), CASES[case].build(networks)

    @jax.jit
    def everything(theta):
        pairs = objective.sample_pairs(theta, world.frozen, world.batch(4), keys(0, 4))
        fresh = objective.renoise(pairs, keys(1, len(pairs.z_m)))

        def mean_loss(theta, pairs):
            return jnp.mean(objective_loss(theta, objective, world, pairs))

        target = objective.target(networks.target(theta, world.frozen), pairs)
        return pairs, fresh, target, jax.value_and_grad(mean_loss)(theta, pairs)

    found = everything(theta)
    floats = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(np.all(np.isfinite(x)) for x in floats)
    pairs = found[0]
    if case in ("node_reuse", "finer", "trajectory"):
        assert np.any(np.asarray(pairs.t_m) == process.start)


def test_a_share_of_the_prompts_is_left_out():
    keys = jax.random.split(jax.random.key(0), 4000)
    given = {"text": jnp.ones((4000, 2, 3)), "pooled": jnp.ones((4000, 5))}
    null = {"text": jnp.zeros((1, 2, 3)), "pooled": jnp.zeros((1, 5))}
    shown = drop_prompts(given, null, keys, 0.1)
    dropped = np.asarray(shown["pooled"][:, 0]) == 0
    assert abs(dropped.mean() - 0.1) < 0.02
    assert np.all(np.asarray(shown["text"]) == np.where(dropped, 0.0, 1.0)[:, None, None])
    # Each by its own key, whatever lies beside it.
    part = drop_prompts(jax.tree.map(lambda x: x[5:50], given), null, keys[5:50], 0.1)
    np.testing.assert_array_equal(np.asarray(part["pooled"][:, 0]) == 0, dropped[5:50])
