"""The loop: interrupted anywhere, a run ends where an uninterrupted one does."""

import os
import signal

import jax
import numpy as np
import optax
import pytest
import toy_regression as toy

from tlcm_jax.training import loop, preemption
from tlcm_jax.training import mesh as meshes
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.positions import Position
from tlcm_jax.training.preemption import Preemption
from tlcm_jax.training.profile import Profiler

TIMES = ("pairs_per_second", "nfe_per_second", "first_step_seconds")


def specs(on=None, first=None, **changes):
    """Refills of 2 steps, then of 4."""
    second = toy.source(on, epochs=2, **changes)
    settings = dict(on=on, rate=3e-3, accumulate=2, pairs=second)
    return [toy.spec("first", 4, on=on, batches=first), toy.spec("second", 10, **settings)]


def bound(**changes):
    """The second stage's pairs depend on the student: it resumes at steps 4 and 8."""
    return specs(sample=toy.sample_by_student, uses_student=True, **changes)


def stop_at(number):
    """Batches of a run that the machine is taken from while it asks for this one."""

    def batches(r):
        if r == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.host_batch(r)

    return batches


def untimed(history):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def latest(folder):
    return Checkpoints(folder / "checkpoints", keep=None).latest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    return toy.run(tmp_path_factory.mktemp("whole"), specs())


@pytest.fixture(scope="module")
def whole_bound(tmp_path_factory):
    return toy.run(tmp_path_factory.mktemp("bound"), bound())


def row_places(history):
    return [(row["stage"], row["step"], row["stage_step"], row["steps"]) for row in history]


def test_an_uninterrupted_run(whole):
    assert whole.completed and whole.position == Position(1, "second", 10, 14)
    assert int(whole.state.step) == 10
    assert row_places(whole.history) == [
        ("first", 2, 2, 2), ("first", 3, 3, 1), ("first", 4, 4, 1),
        ("second", 6, 2, 2), ("second", 7, 3, 1), ("second", 8, 4, 1),
        ("second", 10, 6, 2), ("second", 12, 8, 2), ("second", 13, 9, 1), ("second", 14, 10, 1),
    ]  # fmt: skip
    assert whole.history[-1]["loss"] < 0.9 * whole.history[0]["loss"]
    assert whole.history[0]["first_step_seconds"] > 0
    last = whole.history[-1]
    assert last["nfe_per_second"] / last["pairs_per_second"] == pytest.approx(3.0)
    assert last["pairs"] == toy.BATCH


def test_killed_in_the_middle_of_a_refill_it_resumes_bit_for_bit(whole, tmp_path):
    """Its last checkpoint is of step 6, half-way through a refill of 4 steps."""
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, specs(batches=toy.die_at(2)))
    assert latest(tmp_path) == Position(1, "second", 6, 10)
    again = toy.run(tmp_path, specs())
    toy.assert_close(again.state, whole.state)
    assert untimed(again.history) == untimed(whole.history)


def test_where_pairs_depend_on_the_student_saves_wait_for_the_refill(whole_bound, tmp_path):
    assert row_places(whole_bound.history)[3:] == [
        ("second", 6, 2, 2), ("second", 8, 4, 2), ("second", 10, 6, 2), ("second", 12, 8, 2),
        ("second", 14, 10, 2),
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, bound(batches=toy.die_at(2)), keep=9)
    assert latest(tmp_path) == Position(1, "second", 8, 12)
    # Nothing was saved where a run could not be taken up.
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["12", "3", "4", "8"]
    again = toy.run(tmp_path, bound())
    toy.assert_close(again.state, whole_bound.state)
    assert untimed(again.history) == untimed(whole_bound.history)


def test_killed_inside_such_a_refill_it_repeats_it_from_its_start(whole_bound, tmp_path):
    def die(position, state):
        if position.total == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, bound(), hooks=[loop.Hook(every=1, call=die)])
    assert latest(tmp_path) == Position(1, "second", 4, 8)
    again = toy.run(tmp_path, bound())
    toy.assert_close(again.state, whole_bound.state)


def test_preempted_it_saves_exits_and_resumes_bit_for_bit(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    first = toy.run(tmp_path, specs(batches=stop_at(1)))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not first.completed and first.position == Position(1, "second", 5, 9)
    assert latest(tmp_path) == first.position  # on the disk when the run returns
    again = toy.run(tmp_path, specs())
    assert again.completed and again.history[0] == first.history[0]
    toy.assert_close(again.state, whole.state)


def test_preempted_inside_a_refill_of_the_student_it_goes_on_to_its_end(whole_bound, tmp_path):
    first = toy.run(tmp_path, bound(batches=stop_at(1)))
    assert not first.completed and first.position == Position(1, "second", 8, 12)
    again = toy.run(tmp_path, bound())
    assert again.completed
    toy.assert_close(again.state, whole_bound.state)


def test_preempted_at_a_stage_s_end_it_stops_in_the_next(whole, tmp_path):
    """The word of it, which may come at one step only, is kept until the run can stop."""
    first = toy.run(tmp_path, specs(first=stop_at(1)))
    assert not first.completed and first.position == Position(0, "first", 3, 3)
    asked = []

    class Stopped(Preemption):
        def requested(self, total):
            asked.append(total)
            self._asked = self._asked or total == 4
            return self._asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Preemption", Stopped)
        second = toy.run(tmp_path, specs())
    assert asked == [4, 5] and second.position == Position(1, "second", 1, 5)
    toy.assert_close(toy.run(tmp_path, specs()).state, whole.state)


def test_of_several_processes_the_word_to_stop_is_kept(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda total: total == 7
    )
    with Preemption() as asked:
        assert [asked.requested(total) for total in (6, 7, 8, 9)] == [False, True, True, True]


def test_a_finished_run_comes_back_without_a_step(whole, tmp_path):
    toy.run(tmp_path, specs())
    again = toy.run(tmp_path, specs(batches=toy.die_at(0)))
    assert again.completed and again.position == whole.position
    toy.assert_close(again.state, whole.state)
    assert untimed(again.history) == untimed(whole.history)


def test_interrupted_between_stages_the_next_starts_fresh(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, specs(batches=toy.die_at(0)))
    assert latest(tmp_path) == Position(0, "first", 4, 4)
    toy.assert_close(toy.run(tmp_path, specs()).state, whole.state)


def test_it_resumes_on_another_mesh(whole, tmp_path):
    on = meshes.make_mesh({"data": 2, "fsdp": 4})
    cut = specs(on, batches=lambda r: meshes.shard_batch(on, toy.die_at(2)(r)))
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, cut, on)
    smaller = meshes.make_mesh({"fsdp": 2}, jax.devices()[:2])
    again = toy.run(tmp_path, specs(smaller), smaller)
    toy.assert_close(again.state, whole.state, 1e-5)
    kernel = again.state.student.params["down_blocks.0"]["attn.1"]["kernel"]
    assert len(kernel.addressable_shards) == 2


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_nan_stops_before_it_is_saved(tmp_path, log_every):
    # The refill of step 5 (of the second checkpoint interval) is poisoned.
    def batches(r):
        batch = toy.host_batch(r)
        return {"conditioning": batch["conditioning"] * (np.nan if r == 2 else 1)}

    with pytest.raises(RuntimeError) as error:
        toy.run(tmp_path, [toy.spec("only", 9, batches=batches)], log_every=log_every)
    text = str(error.value)
    assert "stage 'only', step 5: the loss, its gradient or the update is not finite" in text
    assert f"last good checkpoint is {tmp_path}/checkpoints/3" in text
    assert "lower learning rate" in text
    assert latest(tmp_path).total == 3


def test_an_update_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path):
    """Of a finite loss and gradient: at this rate only the parameters overflow."""
    only = toy.spec("only", 1, optimizer=optax.sgd(1e39))
    with pytest.raises(RuntimeError, match="'only', step 1: .*or the update is not finite"):
        toy.run(tmp_path, [only], log_every=100)
    assert latest(tmp_path) is None


def test_hooks_run_on_their_steps_and_at_the_end_of_each_stage(tmp_path):
    seen = []

    def look(position, state):
        seen.append((position.name, position.step, int(state.step)))

    toy.run(tmp_path, specs(), hooks=[loop.Hook(every=3, call=look)])
    assert seen == [("first", 3, 3), ("first", 4, 4), ("second", 3, 3), ("second", 6, 6),
                    ("second", 9, 9), ("second", 10, 10)]  # fmt: skip


def test_a_checkpoint_of_other_stages_is_refused(tmp_path):
    toy.run(tmp_path, [toy.spec("first", 4)])
    with pytest.raises(ValueError, match=r"stage 0 \('first'\), but .* are \['other'\]"):
        toy.run(tmp_path, [toy.spec("other", 4)])
    with pytest.raises(ValueError, match="at step 4 of stage 'first', which now has only 2"):
        toy.run(tmp_path, [toy.spec("first", 2)])


def test_bad_intervals_are_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        loop.LoopSettings(log_every=0, checkpoint_every=5)
    with pytest.raises(ValueError, match="must be at least 1, got 5 and 0"):
        loop.LoopSettings(log_every=5, checkpoint_every=0)


def test_stages_do_not_share_a_key(tmp_path):
    data = []

    def look(position, state):
        data.append(tuple(np.asarray(jax.random.key_data(state.key))))

    toy.run(tmp_path, specs(), hooks=[loop.Hook(every=100, call=look)])
    assert len(data) == len(set(data)) == 2


def test_the_loop_does_not_wait_for_every_step(tmp_path, monkeypatch):
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(1) or real(tree))
    toy.run(tmp_path, [toy.spec(steps=12)], log_every=6, checkpoint_every=100)
    assert len(fetched) == 2


def test_the_profiler_is_told_of_every_step_over_all_stages_and_closed(tmp_path):
    told = []

    class Noted(Profiler):
        def before(self, step):
            told.append(step)

        def __exit__(self, *_):
            told.append("closed")

    toy.run(tmp_path, specs(), profiler=Noted(None))
    assert told == [*range(1, 15), "closed"]
