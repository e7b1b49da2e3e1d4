"""Games: players beside the student, in one step, on every mesh, through every interruption."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy
from tlcm_jax.training.players import Player
from tlcm_jax.training.step import StepSettings, make_step

from tlcm_jax.training import loop, optimizers, sharding
from tlcm_jax.training import mesh as meshes
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.metrics import MetricsWriter
from tlcm_jax.training.state import create

UPDATES = {"chaser": 5, "slow": 2}


def output(trainable, x):
    layer = trainable["down_blocks.0"]["attn.1"]
    return x @ layer["kernel"] + layer["bias"]


def objective(seen=None):
    """The toy regression, drawn besides towards what the chasers say that it makes."""
    base = toy.objective()

    def loss(trainable, frozen, examples, key, others):
        per_sample, metrics = base.loss(trainable, frozen, examples, key)
        made = output(trainable, examples["x"])
        pull = [jnp.sum((made - examples["x"] @ others[name]["w"]) ** 2, -1) for name in UPDATES]
        return per_sample + 0.1 * sum(pull), metrics

    def show(trainable, frozen):
        def made(examples, key):
            if seen is not None:
                data = jax.random.key_data(key)
                jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k))), data)
            made = output(trainable, examples["x"])
            return {"x": examples["x"], "made": made + 0.01 * jax.random.normal(key, made.shape)}

        return made

    return SimpleNamespace(produce=base.produce, loss=loss, show=show)


def player(name, optimizer=None, seen=None):
    def loss(params, frozen, shown, key):
        if seen is not None:
            data = jax.random.key_data(key)
            jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k))), data)
        error = shown["made"] - shown["x"] @ params["w"]
        return jnp.sum(error**2, -1), {"weight": jnp.mean(params["w"])}

    return Player(
        initial=lambda key: {"w": 0.1 * jax.random.normal(key, (toy.FEATURES, toy.TARGETS))},
        loss=loss,
        optimizer=optimizer or optimizers.adamw(3e-2, b1=0.0),
        updates=UPDATES[name],
    )


def players(**options):
    return {name: player(name, **options) for name in UPDATES}


@functools.cache
def game(on, fused):
    optimizer = optimizers.adamw(1e-2)
    settings = StepSettings(updates=2, fused=fused)
    everyone = players()
    made = make_step(objective(), optimizer, settings, on, toy.RULES, everyone)
    return made, optimizer, everyone


def stage(steps=4, batches=None, **changes):
    made, optimizer, everyone = game(None, False)
    return loop.Stage(
        name="game",
        step=made,
        optimizer=optimizer,
        steps=steps,
        batches=batches or toy.host_batch,
        evaluations_per_example=3.0,
        players=everyone,
        **changes,
    )


def play(on=None, fused=False, steps=2):
    made, optimizer, everyone = game(on, fused)
    state = create(toy.trainable(), optimizer, jax.random.key(7), everyone)
    state = sharding.place(state, on, toy.RULES)
    frozen = sharding.place(toy.frozen(), on, toy.RULES)
    for k in range(steps):
        state, metrics = made(state, frozen, meshes.shard_batch(on, toy.host_batch(k)))
    return state, metrics


def run(folder, stages):
    return loop.run(
        stages,
        toy.trainable(),
        toy.frozen(),
        jax.random.key(1),
        checkpoints=Checkpoints(folder / "checkpoints"),
        writer=MetricsWriter(folder),
        settings=loop.LoopSettings(log_every=1, checkpoint_every=2, progress=False),
        rules=toy.RULES,
    )


def assert_close(left, right, tolerance):
    left, right = toy.values(left), toy.values(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=tolerance, atol=tolerance, err_msg=name)


@functools.cache
def alone():
    return play()


@pytest.mark.parametrize(
    ("axes", "fused"), [(None, True), ({"data": 8}, False), ({"data": 2, "fsdp": 4}, True)]
)
def test_every_form_and_mesh_gives_the_same_game(axes, fused):
    on = None if axes is None else meshes.make_mesh(axes)
    for found, expected in zip(play(on, fused), alone(), strict=True):
        assert_close(found, expected, 2e-5)


def test_a_player_s_leaves_lie_where_the_rules_say():
    on = meshes.make_mesh({"data": 2, "fsdp": 4})
    state, _ = play(on, fused=True)
    weights, moments = state.players["chaser"]
    for leaf in (weights["w"], moments[1][0].nu["w"]):
        assert leaf.addressable_shards[0].data.size == leaf.size // 4


def test_everyone_takes_their_own_number_of_updates():
    state, metrics = alone()
    counts = {name: int(pair[1][1][0].count) for name, pair in state.players.items()}
    assert counts == {name: 4 * updates for name, updates in UPDATES.items()}
    assert int(state.opt_state[1][0].count) == 4
    told = {"chaser/loss", "chaser/grad_norm", "chaser/weight", "slow/loss"}
    assert told <= set(metrics) and bool(metrics["finite"])


def test_a_round_is_plain_descent_on_what_the_student_makes():
    """One step by hand: each player in turn, then the student against the moved players."""
    rate = 1e-3
    everyone = {"chaser": player("chaser", optax.sgd(rate))}
    shown = []

    def show(trainable, frozen):
        return lambda examples, key: {
            "x": examples["x"],
            "made": output(trainable, examples["x"]),
        }

    def loss(trainable, frozen, examples, key, others):
        shown.append(sorted(others))
        made = output(trainable, examples["x"])
        return jnp.sum((made - examples["x"] @ others["chaser"]["w"]) ** 2, -1), {}

    made = SimpleNamespace(produce=toy.objective().produce, loss=loss, show=show)
    program = make_step(made, optax.sgd(rate), StepSettings(), players=everyone)
    state = create(toy.trainable(), optax.sgd(rate), jax.random.key(7), everyone)
    w = np.asarray(state.players["chaser"][0]["w"], np.float64)
    kernel = np.asarray(toy.trainable()["down_blocks.0"]["attn.1"]["kernel"], np.float64)
    state, _ = program(state, toy.frozen(), toy.host_batch(0))
    assert shown[0] == ["chaser"]

    produce_key = jax.random.split(jax.random.fold_in(jax.random.key(7), 0), 3)[0]
    examples = toy.objective().produce(None, toy.frozen(), toy.host_batch(0), produce_key)
    x = np.asarray(examples["x"], np.float64)
    for _ in range(5):
        w = w - rate * 2 * x.T @ (x @ (w - kernel)) / len(x)
    kernel = kernel - rate * 2 * x.T @ (x @ (kernel - w)) / len(x)
    np.testing.assert_allclose(state.players["chaser"][0]["w"], w, rtol=1e-5, atol=1e-6)
    trained = state.trainable["down_blocks.0"]["attn.1"]["kernel"]
    np.testing.assert_allclose(trained, kernel, rtol=1e-5, atol=1e-6)


def test_no_key_serves_twice():
    keys = []
    everyone = players(seen=keys)
    base = objective(keys)

    def loss(trainable, frozen, examples, key, others):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda k: keys.append(tuple(np.asarray(k))), data)
        return base.loss(trainable, frozen, examples, key, others)

    made = SimpleNamespace(produce=base.produce, loss=loss, show=base.show)
    optimizer = optax.sgd(1e-3)
    program = make_step(made, optimizer, StepSettings(accumulate=2), players=everyone)
    state = create(toy.trainable(), optimizer, jax.random.key(0), everyone)
    program(state, toy.frozen(), toy.host_batch(0))
    jax.effects_barrier()
    # Two micro-batches: five shown, 5 + 2 of the players', one of the student's.
    assert len(keys) == len(set(keys)) == 2 * (5 + 5 + 2 + 1)


def test_killed_mid_game_it_resumes_bit_for_bit(tmp_path):
    def die(k):
        if k == 3:
            raise KeyboardInterrupt
        return toy.host_batch(k)

    whole = run(tmp_path / "whole", [stage()])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [stage(batches=die)])
    again = run(tmp_path / "cut", [stage()])
    left, right = toy.values(whole.state), toy.values(again.state)
    assert left.keys() == right.keys() and "players/chaser/0/w" in left
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def test_players_are_of_their_stage_and_exports_see_the_student_alone(tmp_path):
    first = toy.stage("first", steps=2)
    result = run(tmp_path, [first, stage(steps=2), toy.stage("last", steps=2)])
    assert result.completed and result.state.players == {}
    trained = Checkpoints(tmp_path / "checkpoints").trained(4)
    assert set(trained) == {"down_blocks.0"}


def test_a_stage_that_has_had_enough_ends_there_and_stays_ended(tmp_path):
    def enough(rows):
        return "the rows say so" if len(rows) >= 3 else ""

    stages = [stage(enough=enough), toy.stage("last", steps=2)]
    result = run(tmp_path, stages)
    assert [row["stage_step"] for row in result.history] == [1, 2, 3, 1, 2]

    def refuse(k):
        raise AssertionError("a step was run")

    # Killed right after the early end, the run goes on with the next stage.
    with pytest.raises(AssertionError, match="a step was run"):
        run(tmp_path / "cut", [stage(enough=enough), toy.stage("last", batches=refuse)])
    again = run(
        tmp_path / "cut", [stage(enough=enough, batches=refuse), toy.stage("last", steps=2)]
    )
    for name, value in toy.values(result.state).items():
        np.testing.assert_array_equal(value, toy.values(again.state)[name])


def test_a_player_who_never_moves_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Player(initial=lambda key: {}, loss=lambda: None, optimizer=optax.sgd(1.0), updates=0)
