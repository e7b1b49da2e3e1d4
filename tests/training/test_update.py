"""The train step: its arithmetic, its micro-batches and keys, and its sameness on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import sharding
from tlcm_jax.training.optimizers import adamw
from tlcm_jax.training.state import create
from tlcm_jax.training.update import OWN_METRICS, make_update, sample_keys


def run(on=None, steps=2, optimizer=None, loss=toy.loss, **settings):
    optimizer = optimizer or adamw(1e-2, warmup_updates=2)
    update = make_update(loss, optimizer, mesh=on, rules=toy.RULES, **settings)
    state = create(toy.trainable(), optimizer, jax.random.key(7))
    frozen = sharding.place(toy.frozen(), on, toy.RULES)
    state = sharding.place(state, on, toy.RULES)
    for k in range(steps):
        state, metrics = update(state, frozen, meshes.shard_batch(on, toy.pairs(k=k)))
    return state, metrics


def test_one_update_is_gradient_descent_on_the_mean_loss():
    rate = 0.01
    state, metrics = run(steps=1, optimizer=optax.sgd(rate))
    x, y = (np.asarray(toy.pairs()[name], np.float64) for name in "xy")
    kernel = np.asarray(toy.trainable()["down_blocks.0"]["attn.1"]["kernel"], np.float64)
    residual = x @ kernel - y
    gradient, bias = 2 * x.T @ residual / len(x), 2 * residual.mean(0)
    trained = state.student.params["down_blocks.0"]["attn.1"]
    np.testing.assert_allclose(trained["kernel"], kernel - rate * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trained["bias"], -rate * bias, rtol=1e-5, atol=1e-6)
    norm = np.sqrt((gradient**2).sum() + (bias**2).sum())
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    after = np.concatenate([(kernel - rate * gradient).ravel(), -rate * bias])
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(after), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (residual**2).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], np.abs(residual).mean(), rtol=1e-5)
    assert bool(metrics["finite"]) and int(state.step) == 1
    floats = {name: value for name, value in metrics.items() if name != "finite"}
    assert all(value.shape == () and value.dtype == jnp.float32 for value in floats.values())


@functools.cache
def alone(accumulate=1):
    return run(accumulate=accumulate)


@pytest.mark.parametrize(
    ("axes", "accumulate"),
    [({"data": 8}, 1), ({"fsdp": 8}, 2), ({"data": 2, "fsdp": 4}, 1), ({"data": 2, "fsdp": 4}, 4)],
)
def test_every_mesh_gives_the_result_of_one_device(axes, accumulate):
    on = meshes.make_mesh(axes)
    state, metrics = run(on, accumulate=accumulate)
    one_state, one_metrics = alone()
    toy.assert_close(state, one_state, 1e-5)
    toy.assert_close(metrics, one_metrics, 1e-5)
    # And it lies where the rules say, moments with their parameters.
    wanted = sharding.tree_shardings(state, on, toy.RULES)
    for leaf, target in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(target, leaf.ndim)
    kernel = state.student.params["down_blocks.0"]["attn.1"]["kernel"]
    moment = state.student.opt_state[1][0].mu["down_blocks.0"]["attn.1"]["kernel"]
    for leaf in (kernel, moment):
        assert leaf.addressable_shards[0].data.size == leaf.size // on.shape["fsdp"]


def test_accumulating_makes_the_same_update():
    for accumulate in (2, 8):
        for whole, parts in zip(alone(), alone(accumulate), strict=True):
            toy.assert_close(whole, parts, 1e-6)


def test_micro_batches_are_equal_parts_of_the_batch_each_seen_once():
    seen = []

    def loss(trainable, frozen, pairs, keys, others):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)[:, 0]), pairs["x"])
        return toy.loss(trainable, frozen, pairs, keys, others)

    run(steps=1, loss=loss, accumulate=4)
    jax.effects_barrier()
    assert [len(x) for x in seen] == [toy.BATCH // 4] * 4
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.sort(toy.pairs()["x"][:, 0]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_key_serves_two_samples_or_steps(accumulate):
    drawn = []

    def loss(trainable, frozen, pairs, keys, others):
        jax.debug.callback(lambda k: drawn.append(np.asarray(k)), jax.random.key_data(keys))
        return toy.loss(trainable, frozen, pairs, keys, others)

    run(steps=2, loss=loss, accumulate=accumulate)
    jax.effects_barrier()
    keys = [tuple(key) for key in np.concatenate(drawn)]
    assert len(keys) == len(set(keys)) == 2 * toy.BATCH


def test_a_sample_s_key_does_not_depend_on_the_micro_batches():
    """A loss that draws noise has one value, however the batch is cut and whatever the mesh."""

    def loss(trainable, frozen, pairs, keys, others):
        noise = jax.vmap(lambda key: jax.random.normal(key, (toy.FEATURES,)))(keys)
        pairs = {**pairs, "x": pairs["x"] + noise}
        return toy.loss(trainable, frozen, pairs, keys, others)

    expected = run(loss=loss)
    for on, accumulate in ((None, 4), (meshes.make_mesh({"data": 4, "fsdp": 2}), 2)):
        for found, one in zip(run(on, loss=loss, accumulate=accumulate), expected, strict=True):
            toy.assert_close(found, one, 1e-5)


def test_keys_differ_by_who_draws_and_by_turn():
    state = create(toy.trainable(), optax.sgd(1.0), jax.random.key(7))
    later = state.replace(step=state.step + 1)
    made = [
        sample_keys(who, 4, salt, turn)
        for who in (state, later)
        for salt in (0, 1)
        for turn in (0, 1)
    ]
    data = [tuple(key) for keys in made for key in np.asarray(jax.random.key_data(keys))]
    assert len(set(data)) == len(data) == 32


def test_the_ema_is_the_weighted_mean_of_what_the_parameters_have_been():
    decay, optimizer = 0.75, optax.sgd(1e-3)
    update = make_update(toy.loss, optimizer, ema_decay=decay)
    state = create(toy.trainable(), optimizer, jax.random.key(7), ema=True)
    states = [toy.values(state.student.params)]
    for k in range(3):
        state, _ = update(state, toy.frozen(), toy.pairs(k=k))
        states.append(toy.values(state.student.params))
    weights = [decay**3, decay**2 * 0.25, decay * 0.25, 0.25]
    for name, found in toy.values(state.student.ema).items():
        expected = sum(w * values[name] for w, values in zip(weights, states, strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        assert np.any(found != states[-1][name])


def test_state_is_float32_and_the_callers_arrays_survive():
    optimizer = adamw(1e-2)
    update = make_update(toy.loss, optimizer)
    for mine in (jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.trainable()), toy.trainable()):
        state = create(mine, optimizer, jax.random.key(0))
        moved, _ = update(state, toy.frozen(), toy.pairs())
        floats = [x for x in jax.tree.leaves(moved) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert all(x.dtype == jnp.float32 for x in floats)
        assert all(not x.is_deleted() for x in jax.tree.leaves(mine))
        assert all(x.is_deleted() for x in jax.tree.leaves(state.student))  # donated


def test_lowers_from_shapes_alone():
    optimizer = adamw(1e-2)
    update = make_update(toy.loss, optimizer, accumulate=2)
    state = jax.eval_shape(lambda: create(toy.trainable(), optimizer, jax.random.key(0)))
    lowered = update.lower(state, jax.eval_shape(toy.frozen), toy.pairs())
    assert "func" in lowered.as_text()


def test_bad_splits_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="a batch of 32 cannot be cut into 5 micro-batches"):
        run(accumulate=5)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_update(toy.loss, optax.sgd(1.0), accumulate=0)
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="ema_decay must lie in 0"):
            make_update(toy.loss, optax.sgd(1.0), ema_decay=decay)


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match=r"one value a sample, \[n\], got \(\)"):
        run(loss=lambda t, f, pairs, keys, others: (jnp.sum(pairs["x"]), {}))
    for own in OWN_METRICS:
        loss = functools.partial(lambda name, t, f, pairs, *_: (pairs["y"][:, 0], {name: 1}), own)
        with pytest.raises(ValueError, match=f"'{own}'.*rename"):
            run(loss=loss)


def poisoned(value):
    def loss(trainable, frozen, pairs, keys, others):
        per_sample, metrics = toy.loss(trainable, frozen, pairs, keys, others)
        return per_sample.at[5].set(value), metrics

    return loss


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_reported(value):
    _, metrics = run(loss=poisoned(value), steps=1)
    assert not bool(metrics["finite"])
    assert bool(run(steps=1)[1]["finite"])


def test_an_update_that_is_not_finite_is_reported_although_its_loss_is():
    _, metrics = run(steps=1, optimizer=optax.sgd(1e39))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not np.isfinite(metrics["param_norm"]) and not bool(metrics["finite"])
