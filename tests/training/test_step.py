"""The jitted step: its arithmetic, its splits, and its sameness on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy
from tlcm_jax.training.step import StepSettings, make_step

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import sharding
from tlcm_jax.training.state import create


def run(on=None, steps=2, optimizer=None, objective=None, **settings):
    optimizer = optimizer or toy.stage().optimizer
    program = make_step(
        objective or toy.objective(), optimizer, StepSettings(**settings), on, toy.RULES
    )
    state = create(toy.trainable(), optimizer, jax.random.key(7))
    frozen = sharding.place(toy.frozen(), on, toy.RULES)
    state = sharding.place(state, on, toy.RULES)
    for k in range(steps):
        state, metrics = program(state, frozen, meshes.shard_batch(on, toy.host_batch(k)))
    return state, metrics


def assert_close(left, right, tolerance):
    left, right = toy.values(left), toy.values(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_one_update_is_gradient_descent_on_the_mean_loss():
    rate = 0.01
    state, metrics = run(steps=1, optimizer=optax.sgd(rate))
    produce_key = jax.random.split(jax.random.fold_in(jax.random.key(7), 0), 3)[0]
    examples = toy.objective().produce(None, toy.frozen(), toy.host_batch(0), produce_key)
    x, y = np.asarray(examples["x"], np.float64), np.asarray(examples["y"], np.float64)
    kernel = np.asarray(toy.trainable()["down_blocks.0"]["attn.1"]["kernel"], np.float64)
    residual = x @ kernel - y
    gradient, bias = 2 * x.T @ residual / len(x), 2 * residual.mean(0)
    trained = state.trainable["down_blocks.0"]["attn.1"]
    np.testing.assert_allclose(trained["kernel"], kernel - rate * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trained["bias"], -rate * bias, rtol=1e-5, atol=1e-6)
    norm = np.sqrt((gradient**2).sum() + (bias**2).sum())
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (residual**2).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], np.abs(residual).mean(), rtol=1e-5)
    assert metrics["examples"] == len(x) and bool(metrics["finite"]) and int(state.step) == 1


@functools.cache
def alone(accumulate, fused):
    """Two steps of two updates on one device."""
    return run(updates=2, accumulate=accumulate, fused=fused)


@pytest.mark.parametrize(
    ("axes", "fused"),
    [
        ({"data": 8}, False),
        ({"fsdp": 8}, True),
        ({"data": 2, "fsdp": 4}, False),
        ({"data": 2, "fsdp": 4}, True),
    ],
)
def test_every_mesh_gives_the_result_of_one_device(axes, fused):
    on = meshes.make_mesh(axes)
    state, metrics = run(on, updates=2, accumulate=2, fused=fused)
    one_state, one_metrics = alone(2, fused)
    assert_close(state, one_state, 1e-5)
    assert_close(metrics, one_metrics, 1e-5)
    # And it lies where the rules say, moments with their parameters.
    wanted = sharding.tree_shardings(state, on, toy.RULES)
    for leaf, target in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(target, leaf.ndim)
    kernel = state.trainable["down_blocks.0"]["attn.1"]["kernel"]
    moment = state.opt_state[1][0].mu["down_blocks.0"]["attn.1"]["kernel"]
    parts = on.shape["fsdp"]
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    assert moment.addressable_shards[0].data.size == kernel.size // parts


def test_one_program_and_two_programs_agree():
    for one, two in zip(alone(2, True), alone(2, False), strict=True):
        assert_close(one, two, 1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_accumulating_makes_the_same_update(fused):
    for whole, parts in zip(alone(1, fused), alone(2, fused), strict=True):
        assert_close(whole, parts, 1e-6)


def test_examples_are_shuffled_between_updates_and_none_is_lost():
    seen = []
    base = toy.objective()

    def loss(trainable, frozen, examples, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), examples["x"])
        return base.loss(trainable, frozen, examples, key)

    objective = toy.SimpleNamespace(produce=base.produce, loss=loss)
    run(steps=1, objective=objective, updates=4)
    jax.effects_barrier()
    produce_key = jax.random.split(jax.random.fold_in(jax.random.key(7), 0), 3)[0]
    made = np.asarray(base.produce(None, toy.frozen(), toy.host_batch(0), produce_key)["x"])
    first = np.concatenate([x[:, 0] for x in seen])
    np.testing.assert_allclose(np.sort(first), np.sort(made[:, 0]), rtol=1e-5, atol=1e-6)
    unshuffled = np.sort(made[: len(seen[0]), 0])
    assert not np.allclose(np.sort(seen[0][:, 0]), unshuffled, rtol=1e-3)


def test_no_key_serves_two_micro_batches_or_steps():
    keys = []
    base = toy.objective()

    def loss(trainable, frozen, examples, key):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda k: keys.append(tuple(np.asarray(k))), data)
        return base.loss(trainable, frozen, examples, key)

    run(
        steps=2,
        objective=toy.SimpleNamespace(produce=base.produce, loss=loss),
        updates=2,
        accumulate=2,
    )
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 8


@pytest.mark.parametrize("fused", [True, False])
def test_every_epoch_sees_every_example_in_an_order_and_with_keys_of_its_own(fused):
    seen, keys = [], []
    base = toy.objective()

    def loss(trainable, frozen, examples, key):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)[:, 0]), examples["x"], ordered=True)
        jax.debug.callback(lambda k: keys.append(tuple(np.asarray(k))), data)
        return base.loss(trainable, frozen, examples, key)

    objective = toy.SimpleNamespace(produce=base.produce, loss=loss)
    state, metrics = run(steps=1, objective=objective, updates=2, epochs=3, fused=fused)
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 6
    assert metrics["examples"] == len(seen[0]) * 2
    epochs = [np.concatenate(seen[i : i + 2]) for i in (0, 2, 4)]
    for other in epochs[1:]:
        np.testing.assert_array_equal(np.sort(other), np.sort(epochs[0]))
        assert np.mean(other == epochs[0]) < 0.2
    assert int(state.opt_state[1][0].count) == 6 and int(state.step) == 1


def test_state_is_float32_and_the_callers_arrays_survive():
    mine = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.trainable())
    optimizer = toy.stage().optimizer
    program = make_step(toy.objective(), optimizer)
    state = create(mine, optimizer, jax.random.key(0))
    state, _ = program(state, toy.frozen(), toy.host_batch(0))
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in floats)
    assert all(not x.is_deleted() for x in jax.tree.leaves(mine))
    full = toy.trainable()
    state = create(full, optimizer, jax.random.key(0))
    program(state, toy.frozen(), toy.host_batch(0))
    assert all(not x.is_deleted() for x in jax.tree.leaves(full))


def test_lowers_from_shapes_alone():
    optimizer = toy.stage().optimizer
    program = make_step(toy.objective(), optimizer, StepSettings(updates=2))
    state = jax.eval_shape(lambda: create(toy.trainable(), optimizer, jax.random.key(0)))
    lowered = program.lower(state, jax.eval_shape(toy.frozen), toy.host_batch(0))
    assert "func" in lowered.as_text()


def test_bad_splits_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match=r"64 examples, which 5 updates of 1 micro-batches"):
        run(updates=5)
    with pytest.raises(ValueError, match=r"micro-batch \(64 .* is 4, which the 8 devices"):
        run(meshes.make_mesh({"data": -1}), updates=16)
    for name in ("updates", "accumulate", "epochs"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            StepSettings(**{name: 0})
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="ema_decay must lie in 0"):
            StepSettings(ema_decay=decay)


def test_bad_losses_are_refused():
    def objective(loss):
        return toy.SimpleNamespace(produce=toy.objective().produce, loss=loss)

    with pytest.raises(ValueError, match="one value a sample"):
        run(objective=objective(lambda t, f, e, k: (jnp.sum(e["x"]), {})))
    with pytest.raises(ValueError, match="'loss'.*rename"):
        run(objective=objective(lambda t, f, e, k: (e["x"][:, 0], {"loss": e["x"]})))


def test_a_nan_is_reported():
    base = toy.objective()

    def loss(trainable, frozen, examples, key):
        per_sample, metrics = base.loss(trainable, frozen, examples, key)
        return per_sample.at[5].set(jnp.nan), metrics

    _, metrics = run(objective=toy.SimpleNamespace(produce=base.produce, loss=loss), steps=1)
    assert not bool(metrics["finite"])
