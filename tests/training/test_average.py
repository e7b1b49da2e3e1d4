"""The average of the student: its arithmetic, who sees it, and that it survives interruptions."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy
from tlcm_jax.training.step import StepSettings, make_step

from tlcm_jax.training import loop, sharding
from tlcm_jax.training import mesh as meshes
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.metrics import MetricsWriter
from tlcm_jax.training.state import create
from tlcm_jax.training.update import AVERAGE

DECAY = 0.75


def objective(strength=0.0):
    """The toy regression, held besides to the average's own predictions."""
    base = toy.objective()

    def loss(trainable, frozen, examples, key, seen):
        per_sample, metrics = base.loss(trainable, frozen, examples, key)
        mine, past = (tree["down_blocks.0"]["attn.1"] for tree in (trainable, seen[AVERAGE]))
        apart = examples["x"] @ (mine["kernel"] - past["kernel"])
        return per_sample + strength * jnp.sum(apart**2, -1), {**metrics, "apart": apart[:, 0] ** 2}

    return SimpleNamespace(produce=base.produce, loss=loss)


@functools.cache
def program(on=None, fused=None, strength=0.5):
    optimizer = optax.sgd(1e-2)
    settings = StepSettings(updates=2, ema_decay=DECAY, fused=fused)
    return make_step(objective(strength), optimizer, settings, on, toy.RULES), optimizer


def play(on=None, fused=None, steps=2):
    made, optimizer = program(on, fused)
    state = create(toy.trainable(), optimizer, jax.random.key(7), average=True)
    state = sharding.place(state, on, toy.RULES)
    frozen = sharding.place(toy.frozen(), on, toy.RULES)
    for k in range(steps):
        state, metrics = made(state, frozen, meshes.shard_batch(on, toy.host_batch(k)))
    return state, metrics


def test_it_is_the_weighted_mean_of_what_the_student_has_been():
    optimizer = optax.sgd(1e-3)
    settings = StepSettings(ema_decay=DECAY)
    made = make_step(objective(), optimizer, settings)
    state = create(toy.trainable(), optimizer, jax.random.key(0), average=True)
    before = [toy.values(state.trainable)]
    for k in range(3):
        state, _ = made(state, toy.frozen(), toy.host_batch(k))
        before.append(toy.values(state.trainable))
    weights = [DECAY**3, DECAY**2 * 0.25, DECAY * 0.25, 0.25]
    for name, found in toy.values(state.average).items():
        expected = sum(w * values[name] for w, values in zip(weights, before, strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        assert np.any(found != before[-1][name])
    assert state.trained is state.average


def test_the_loss_sees_it_as_it_was_before_the_update():
    """At a stage's first update the average is the student itself, and then no more."""
    optimizer = optax.sgd(1e-3)
    made = make_step(objective(), optimizer, StepSettings(ema_decay=DECAY))
    state = create(toy.trainable(), optimizer, jax.random.key(0), average=True)
    state, first = made(state, toy.frozen(), toy.host_batch(0))
    _, second = made(state, toy.frozen(), toy.host_batch(1))
    assert first["apart"] == 0 < second["apart"]


@pytest.mark.parametrize(("axes", "fused"), [(None, True), ({"data": 2, "fsdp": 4}, True)])
def test_every_form_and_mesh_gives_the_same_average(axes, fused):
    on = None if axes is None else meshes.make_mesh(axes)
    state, _ = play(on, fused)
    expected = toy.values(play()[0])
    for name, found in toy.values(state).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    if on is not None:
        kernel = state.average["down_blocks.0"]["attn.1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4


def run(folder, batches=toy.host_batch):
    made, optimizer = program()
    averaged = loop.Stage(
        name="averaged",
        step=made,
        optimizer=optimizer,
        steps=5,
        batches=batches,
        evaluations_per_example=1.0,
        average=True,
    )
    return loop.run(
        [toy.stage("plain", steps=2), averaged],
        toy.trainable(),
        toy.frozen(),
        jax.random.key(1),
        checkpoints=Checkpoints(folder / "checkpoints", keep=9),
        writer=MetricsWriter(folder),
        settings=loop.LoopSettings(log_every=1, checkpoint_every=2, progress=False),
        rules=toy.RULES,
    )


def test_killed_it_resumes_bit_for_bit_and_exports_the_average(tmp_path):
    def die(k):
        if k == 3:
            raise KeyboardInterrupt
        return toy.host_batch(k)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", die)
    again = run(tmp_path / "cut")
    left, right = toy.values(whole.state), toy.values(again.state)
    assert left.keys() == right.keys() and any(name.startswith("average/") for name in left)
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)

    def stored(total):
        return toy.values(Checkpoints(tmp_path / "whole" / "checkpoints", keep=None).trained(total))

    for name, value in toy.values(whole.state.average).items():
        np.testing.assert_array_equal(stored(7)[name], value)
        assert np.any(value != toy.values(whole.state.trainable)[name])
    # The stage before kept none: there the leaves themselves are exported.
    plain = loop.run(
        [toy.stage("plain", steps=2)],
        toy.trainable(),
        toy.frozen(),
        jax.random.key(1),
        checkpoints=Checkpoints(tmp_path / "plain" / "checkpoints"),
        writer=MetricsWriter(tmp_path / "plain"),
        settings=loop.LoopSettings(log_every=1, checkpoint_every=2, progress=False),
        rules=toy.RULES,
    )
    assert plain.state.average == {} and plain.state.trained is plain.state.trainable
    for name, value in toy.values(plain.state.trainable).items():
        np.testing.assert_array_equal(stored(2)[name], value)
    assert not any(name.startswith("average") for name in toy.values(plain.state))
