"""A stage: auxiliary networks beside the student, their rounds, and what is reported of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import optimizers, sharding
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.stage import AuxTraining, Stage

UPDATES = {"chaser": 5, "slow": 2}


def note(seen, keys):
    if seen is not None:
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), jax.random.key_data(keys))


def loss(trainable, frozen, pairs, keys, others):
    """The toy's, drawn besides towards what the auxiliary networks say that it makes."""
    per_sample, metrics = toy.loss(trainable, frozen, pairs, keys, others)
    made = toy.output(trainable, pairs["x"])
    pull = [jnp.sum((made - pairs["x"] @ others[name]["w"]) ** 2, -1) for name in UPDATES]
    return per_sample + 0.1 * sum(pull), metrics


def aux_batch(trainable, frozen, pairs, keys, seen=None):
    note(seen, keys)
    made = toy.output(trainable, pairs["x"])
    noise = jax.vmap(lambda key: jax.random.normal(key, made.shape[1:]))(keys)
    return {"x": pairs["x"], "made": made + 0.01 * noise}


def aux(name, optimizer=None, seen=None):
    def aux_loss(params, frozen, outputs, keys):
        note(seen, keys)
        error = outputs["made"] - outputs["x"] @ params["w"]
        return jnp.sum(error**2, -1), {"weight": jnp.mean(params["w"])}

    return AuxTraining(
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (toy.FEATURES, toy.TARGETS))},
        loss=aux_loss,
        optimizer=optimizer or optimizers.adamw(3e-2, b1=0.0),
        updates=UPDATES[name],
    )


def everyone(**options):
    return {name: aux(name, **options) for name in UPDATES}


def spec(steps=4, name="adversarial", **changes):
    options = dict(loss=loss, aux=everyone(), aux_batch=aux_batch)
    return toy.spec(name, steps, **(options | changes))


def play(on=None, steps=2, **changes):
    stage = Stage(spec(on=on, **changes), on, toy.RULES)
    state = stage.spec.create_state(toy.trainable(), jax.random.key(7))
    state = sharding.place(state, on, toy.RULES)
    for k in range(steps):
        pairs = stage.stream.next(k, state, stage.spec.frozen)
        state, metrics = stage.step(state, stage.spec.frozen, pairs)
    return state, metrics


@functools.cache
def alone():
    return play()


def run(folder, specs):
    return toy.run(folder, specs, log_every=1, checkpoint_every=2)


@pytest.mark.parametrize(
    ("axes", "accumulate"), [(None, 2), ({"data": 8}, 1), ({"data": 2, "fsdp": 4}, 1)]
)
def test_every_mesh_and_cut_gives_the_same_training(axes, accumulate):
    on = None if axes is None else meshes.make_mesh(axes)
    state, metrics = play(on, accumulate=accumulate)
    toy.assert_close(state, alone()[0], 2e-5)
    toy.assert_close(metrics, alone()[1], 2e-5)
    if axes and "fsdp" in axes:
        network = state.networks["chaser"]
        for leaf in (network.params["w"], network.opt_state[1][0].nu["w"]):
            assert leaf.addressable_shards[0].data.size == leaf.size // 4


def test_each_network_takes_its_own_number_of_updates():
    state, metrics = alone()
    counts = {name: int(net.opt_state[1][0].count) for name, net in state.networks.items()}
    assert counts == {"student": 2, **{name: 2 * n for name, n in UPDATES.items()}}
    assert int(state.step) == 2
    named = {"chaser/loss", "chaser/grad_norm", "chaser/param_norm", "chaser/weight", "slow/loss"}
    assert named <= set(metrics) and bool(metrics["finite"])
    assert "chaser/finite" not in metrics


def test_networks_begin_apart_and_each_by_its_own_key():
    state = spec().create_state(toy.trainable(), jax.random.key(7))
    first, second = (np.asarray(state.networks[name].params["w"]) for name in UPDATES)
    assert np.mean(first == second) < 0.01
    again = spec().create_state(toy.trainable(), jax.random.key(8))
    assert np.mean(np.asarray(again.networks["slow"].params["w"]) == second) < 0.01


def test_a_step_is_plain_descent_on_what_the_student_makes():
    """By hand: the auxiliary network's updates, then the student against what it became."""
    rate, named = 1e-3, []

    def show(trainable, frozen, pairs, keys):
        return {"x": pairs["x"], "made": toy.output(trainable, pairs["x"])}

    def follow(trainable, frozen, pairs, keys, others):
        named.append(sorted(others))
        made = toy.output(trainable, pairs["x"])
        return jnp.sum((made - pairs["x"] @ others["chaser"]["w"]) ** 2, -1), {}

    sgd = optax.sgd(rate)
    chased = {"chaser": aux("chaser", sgd)}
    stage = Stage(spec(loss=follow, optimizer=sgd, aux=chased, aux_batch=show))
    state = stage.spec.create_state(toy.trainable(), jax.random.key(7))
    w = np.asarray(state.networks["chaser"].params["w"], np.float64)
    kernel = np.asarray(toy.trainable()["down_blocks.0"]["attn.1"]["kernel"], np.float64)
    pairs = toy.pairs()
    state, metrics = stage.step(state, toy.frozen(), pairs)
    assert named[0] == ["chaser"]

    x, losses = np.asarray(pairs["x"], np.float64), []
    for _ in range(5):
        losses.append(np.sum((x @ (w - kernel)) ** 2, -1).mean())
        w = w - rate * 2 * x.T @ (x @ (w - kernel)) / len(x)
    np.testing.assert_allclose(metrics["loss"], np.sum((x @ (kernel - w)) ** 2, -1).mean(), 1e-5)
    kernel = kernel - rate * 2 * x.T @ (x @ (kernel - w)) / len(x)
    found = state.networks["chaser"].params["w"]
    np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)
    trained = state.student.params["down_blocks.0"]["attn.1"]["kernel"]
    np.testing.assert_allclose(trained, kernel, rtol=1e-5, atol=1e-6)
    # What is reported of it is the mean over its updates.
    np.testing.assert_allclose(metrics["chaser/loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_key_serves_twice(accumulate):
    drawn = []

    def noted(trainable, frozen, pairs, keys, others):
        note(drawn, keys)
        return loss(trainable, frozen, pairs, keys, others)

    show = functools.partial(aux_batch, seen=drawn)
    stage = Stage(spec(loss=noted, aux=everyone(seen=drawn), aux_batch=show, accumulate=accumulate))
    state = stage.spec.create_state(toy.trainable(), jax.random.key(0))
    for k in range(2):
        state, _ = stage.step(state, toy.frozen(), toy.pairs(k))
    jax.effects_barrier()
    keys = [tuple(key) for key in np.concatenate(drawn)]
    # Five batches shown, 5 + 2 of the auxiliary networks' updates, one of the student's.
    assert len(keys) == len(set(keys)) == 2 * toy.BATCH * (5 + 5 + 2 + 1)


@pytest.mark.parametrize("who", [*UPDATES, "student"])
def test_whoever_is_not_finite_the_step_says_so(who):
    rates = {name: 1e39 if name == who else 1e-3 for name in (*UPDATES, "student")}
    aux_ = {name: aux(name, optax.sgd(rates[name])) for name in UPDATES}

    def calm(trainable, frozen, pairs, keys, others):  # others' overflow does not reach it
        return toy.loss(trainable, frozen, pairs, keys, others)

    changes = dict(loss=calm, aux=aux_, optimizer=optax.sgd(rates["student"]))
    _, metrics = play(steps=1, **changes)
    assert not bool(metrics["finite"])
    assert np.isfinite(metrics["loss"])


def test_killed_mid_stage_it_resumes_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", [spec(6)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [spec(6, batches=toy.die_at(2))])
    again = run(tmp_path / "cut", [spec(6)])
    assert "networks/chaser/params/w" in toy.values(whole.state)
    toy.assert_close(whole.state, again.state)


def test_auxiliary_networks_are_of_their_stage_and_exports_see_the_student_alone(tmp_path):
    result = run(tmp_path, [toy.spec("first", 2), spec(2), toy.spec("last", 2)])
    assert result.completed and set(result.state.networks) == {"student"}
    trained = Checkpoints(tmp_path / "checkpoints").trained(4)
    assert set(trained) == {"down_blocks.0"}


def test_a_stage_that_should_stop_ends_there_and_stays_ended(tmp_path):
    def should_stop(rows):
        return "the rows say so" if len(rows) >= 3 else ""

    def specs(**last):
        # Its third step is in the middle of a refill that depends on the student.
        pairs = toy.source(sample=toy.sample_by_student, uses_student=True)
        return [spec(should_stop=should_stop, pairs=pairs), toy.spec("last", 2, **last)]

    result = run(tmp_path, specs())
    assert [row["stage_step"] for row in result.history] == [1, 2, 3, 1, 2]

    # Killed right after the early end, the run goes on with the next stage.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", specs(batches=toy.die_at(0)))
    again = run(tmp_path / "cut", specs())
    assert [row["stage_step"] for row in again.history] == [1, 2, 3, 1, 2]
    toy.assert_close(result.state, again.state)


def test_what_cannot_train_is_refused():
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        AuxTraining(init=lambda key: {}, loss=lambda: None, optimizer=optax.sgd(1.0), updates=0)
    with pytest.raises(ValueError, match=r"\['chaser', 'slow'\] are shown nothing: give"):
        play(aux_batch=None)
    with pytest.raises(ValueError, match="stage 'x' has 0 steps"):
        spec(0, name="x")
