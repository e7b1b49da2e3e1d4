"""The loop: interrupted anywhere, a run ends where an uninterrupted one does."""

import os
import signal

import jax
import numpy as np
import pytest
import toy_regression as toy

from tlcm_jax.training import loop, sharding
from tlcm_jax.training import mesh as meshes
from tlcm_jax.training.checkpoints import Checkpoints, Position
from tlcm_jax.training.metrics import MetricsWriter

TIMES = ("samples_per_second", "unet_evaluations_per_second", "first_step_seconds")
QUIET = {"log_every": 2, "checkpoint_every": 3, "progress": False}


def run(folder, stages, on=None, hooks=(), frozen=None, keep=2, **settings):
    return loop.run(
        stages,
        toy.trainable(),
        sharding.place(toy.frozen() if frozen is None else frozen, on, toy.RULES),
        jax.random.key(1),
        checkpoints=Checkpoints(folder / "checkpoints", keep=keep),
        writer=MetricsWriter(folder),
        settings=loop.LoopSettings(**{**QUIET, **settings}),
        mesh=on,
        rules=toy.RULES,
        hooks=hooks,
    )


def stages(on=None, **changes):
    return [
        toy.stage("first", steps=4, on=on),
        toy.stage("second", steps=8, on=on, rate=3e-3, accumulate=2, **changes),
    ]


def stop_at(step):
    """Batches of a stage that the machine is taken from while it draws number `step`."""

    def batches(k):
        if k == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.host_batch(k)

    return batches


def die_at(step):
    def batches(k):
        if k == step:
            raise KeyboardInterrupt
        return toy.host_batch(k)

    return batches


def untimed(history):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def assert_same_state(left, right, tolerance=0.0):
    left, right = toy.values(left), toy.values(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole"), stages())


def test_an_uninterrupted_run(whole):
    assert whole.completed and whole.position == Position(1, "second", 8, 12)
    assert int(whole.state.step) == 8
    rows = [(row["stage"], row["step"], row["stage_step"], row["steps"]) for row in whole.history]
    assert rows == [
        ("first", 2, 2, 2), ("first", 3, 3, 1), ("first", 4, 4, 1),
        ("second", 6, 2, 2), ("second", 7, 3, 1), ("second", 8, 4, 1),
        ("second", 10, 6, 2), ("second", 12, 8, 2),
    ]  # fmt: skip
    assert whole.history[-1]["loss"] < 0.9 * whole.history[0]["loss"]
    assert whole.history[0]["first_step_seconds"] > 0
    last = whole.history[-1]
    ratio = last["unet_evaluations_per_second"] / last["samples_per_second"]
    assert ratio == pytest.approx(3.0)


def test_killed_mid_stage_it_resumes_bit_for_bit(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stages(batches=die_at(5)))
    assert Checkpoints(tmp_path / "checkpoints").latest() == Position(1, "second", 3, 7)
    again = run(tmp_path, stages())
    assert_same_state(again.state, whole.state)
    assert untimed(again.history) == untimed(whole.history)


def test_preempted_it_saves_exits_and_resumes_bit_for_bit(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    first = run(tmp_path, stages(batches=stop_at(4)))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not first.completed and first.position == Position(1, "second", 5, 9)
    again = run(tmp_path, stages())
    assert again.completed and again.history[0] == first.history[0]
    assert_same_state(again.state, whole.state)


def test_a_finished_run_comes_back_without_a_step(whole, tmp_path):
    run(tmp_path, stages())
    again = run(tmp_path, stages(batches=die_at(0)))
    assert again.completed and again.position == whole.position
    assert_same_state(again.state, whole.state)
    assert untimed(again.history) == untimed(whole.history)


def test_interrupted_between_stages_the_next_starts_fresh(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stages(batches=die_at(0)))
    assert Checkpoints(tmp_path / "checkpoints").latest() == Position(0, "first", 4, 4)
    assert_same_state(run(tmp_path, stages()).state, whole.state)


def test_it_resumes_on_another_mesh(whole, tmp_path):
    on = meshes.make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stages(on, batches=lambda k: meshes.shard_batch(on, die_at(5)(k))), on)
    smaller = meshes.make_mesh({"fsdp": 2}, jax.devices()[:2])
    again = run(tmp_path, stages(smaller), smaller)
    assert_same_state(again.state, whole.state, 1e-5)
    kernel = again.state.trainable["down_blocks.0"]["attn.1"]["kernel"]
    assert len(kernel.addressable_shards) == 2


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_nan_stops_before_it_is_saved(tmp_path, log_every):
    # The batch of step 5 (of the second checkpoint interval) is poisoned.
    def batches(k):
        batch = toy.host_batch(k)
        return {"conditioning": batch["conditioning"] * (np.nan if k == 4 else 1)}

    with pytest.raises(RuntimeError) as error:
        run(tmp_path, [toy.stage("only", steps=9, batches=batches)], log_every=log_every)
    text = str(error.value)
    assert "stage 'only', step 5: the loss or its gradient is not finite" in text
    assert f"last good checkpoint is {tmp_path}/checkpoints/3" in text
    assert "lower learning rate" in text
    assert Checkpoints(tmp_path / "checkpoints").latest().total == 3


def test_hooks_run_on_their_steps_and_at_the_end_of_each_stage(tmp_path):
    seen = []

    def look(position, state):
        seen.append((position.name, position.step, int(state.step)))

    run(tmp_path, stages(), hooks=[loop.Hook(every=3, call=look)])
    assert seen == [("first", 3, 3), ("first", 4, 4), ("second", 3, 3), ("second", 6, 6),
                    ("second", 8, 8)]  # fmt: skip


def test_a_checkpoint_of_other_stages_is_refused(tmp_path):
    run(tmp_path, [toy.stage("first", steps=4)])
    with pytest.raises(ValueError, match=r"stage 0 \('first'\), but .* are \['other'\]"):
        run(tmp_path, [toy.stage("other", steps=4)])
    with pytest.raises(ValueError, match="at step 4 of stage 'first', which now has only 2"):
        run(tmp_path, [toy.stage("first", steps=2)])


def test_bad_intervals_and_empty_stages_are_refused():
    with pytest.raises(ValueError, match="stage 'x' has 0 steps"):
        toy.stage("x", steps=0)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        loop.LoopSettings(log_every=0, checkpoint_every=5)


def test_stages_do_not_share_a_key(tmp_path):
    data = []

    def look(position, state):
        data.append(tuple(np.asarray(jax.random.key_data(state.key))))

    run(tmp_path, stages(), hooks=[loop.Hook(every=100, call=look)])
    assert len(data) == len(set(data)) == 2


def test_the_loop_does_not_wait_for_every_step(tmp_path, monkeypatch):
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(1) or real(tree))
    run(tmp_path, [toy.stage(steps=12)], log_every=6, checkpoint_every=100)
    assert len(fetched) == 2
