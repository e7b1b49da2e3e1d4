"""The student's EMA: who sees it, that it is of its stage, and that it survives interruptions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import sharding
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.state import create
from tlcm_jax.training.update import EMA, make_update

DECAY = 0.75


def loss(trainable, frozen, pairs, keys, others, strength=0.5):
    """The toy's, held besides to the EMA's own predictions."""
    per_sample, metrics = toy.loss(trainable, frozen, pairs, keys, others)
    mine, past = (tree["down_blocks.0"]["attn.1"] for tree in (trainable, others[EMA]))
    apart = pairs["x"] @ (mine["kernel"] - past["kernel"])
    return per_sample + strength * jnp.sum(apart**2, -1), {**metrics, "apart": apart[:, 0] ** 2}


@functools.cache
def play(on=None, steps=2, accumulate=1):
    optimizer = optax.sgd(1e-2)
    settings = dict(ema_decay=DECAY, accumulate=accumulate, mesh=on, rules=toy.RULES)
    update = make_update(loss, optimizer, **settings)
    state = create(toy.trainable(), optimizer, jax.random.key(7), ema=True)
    state, frozen = (sharding.place(tree, on, toy.RULES) for tree in (state, toy.frozen()))
    for k in range(steps):
        state, metrics = update(state, frozen, meshes.shard_batch(on, toy.pairs(k)))
    return state, metrics


def test_the_loss_sees_it_as_it_was_before_the_update():
    """At a stage's first update the EMA is the student itself, and then no more."""
    assert play(steps=1)[1]["apart"] == 0 < play(steps=2)[1]["apart"]


@pytest.mark.parametrize(("axes", "accumulate"), [(None, 4), ({"data": 2, "fsdp": 4}, 1)])
def test_every_mesh_and_cut_gives_the_same_ema(axes, accumulate):
    on = None if axes is None else meshes.make_mesh(axes)
    state, _ = play(on, accumulate=accumulate)
    toy.assert_close(state, play()[0], 1e-5)
    if on is not None:
        kernel = state.student.ema["down_blocks.0"]["attn.1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_it_is_what_a_stage_leaves_where_one_is_kept():
    kept = create(toy.trainable(), optax.sgd(1.0), jax.random.key(0), ema=True)
    assert kept.trained is kept.student.ema
    toy.assert_close(kept.student.ema, kept.student.params)
    none = create(toy.trainable(), optax.sgd(1.0), jax.random.key(0))
    assert none.student.ema == {} and none.trained is none.student.params


def run(folder, **changes):
    averaged = toy.spec("averaged", 6, loss=loss, ema_decay=DECAY, **changes)
    specs = [toy.spec("plain", 2), averaged]
    return toy.run(folder, specs, keep=9, log_every=1, checkpoint_every=2)


def test_killed_it_resumes_bit_for_bit_and_exports_the_ema(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batches=toy.die_at(2))
    again = run(tmp_path / "cut")
    assert any(name.startswith("networks/student/ema/") for name in toy.values(whole.state))
    toy.assert_close(again.state, whole.state)

    reader = Checkpoints(tmp_path / "whole" / "checkpoints", keep=None)
    student = whole.state.student
    toy.assert_close(reader.trained(8), student.ema)
    for name, value in toy.values(student.ema).items():
        assert np.any(value != toy.values(student.params)[name])
    # The stage before kept none: there the leaves themselves are exported.
    plain = toy.run(tmp_path / "plain", [toy.spec("plain", 2)])
    assert plain.state.student.ema == {}
    toy.assert_close(reader.trained(2), plain.state.student.params)


def test_the_next_stage_trains_the_parameters_and_not_their_ema(tmp_path):
    """A stage at rate 0 leaves what it was given: here what the stage before trained itself."""
    still = toy.spec("still", 1, optimizer=optax.sgd(0.0))
    first = toy.spec("averaged", 2, loss=loss, ema_decay=DECAY)
    both = toy.run(tmp_path / "both", [first, still])
    alone = toy.run(tmp_path / "alone", [first])
    toy.assert_close(both.state.student.params, alone.state.student.params)
    assert both.state.student.ema == {}
