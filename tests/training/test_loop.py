"""The loop: interrupted anywhere, a run ends where an uninterrupted one does."""

import dataclasses
import errno
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_regression as toy

from tlcm_jax.training import loop, preemption
from tlcm_jax.training import mesh as meshes
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.nonfinite import NonFiniteError
from tlcm_jax.training.pairs import PairStream
from tlcm_jax.training.positions import Position
from tlcm_jax.training.preemption import Preemption
from tlcm_jax.training.profile import Profiler
from tlcm_jax.training.state import create

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


def poisoned(*numbers):
    """Batches of prompts of which some are NaN, two updates each."""

    def batches(r):
        return {"conditioning": toy.host_batch(r)["conditioning"] * (np.nan if r in numbers else 1)}

    return batches


def test_updates_that_are_not_finite_are_skipped_counted_and_resumed_bit_for_bit(tmp_path):
    whole = toy.run(tmp_path / "whole", [toy.spec("only", 12, batches=poisoned(1, 3))])
    assert whole.completed
    skips = [
        (row["step"], row.get("skipped"), row.get("skipped_in_a_row")) for row in whole.history
    ]
    assert skips == [
        (2, None, None), (3, 1, 1), (4, 1, 2), (6, None, None), (8, 2, 2), (9, None, None),
        (10, None, None), (12, None, None),
    ]  # fmt: skip
    assert all(np.isfinite(leaf).all() for leaf in toy.values(whole.state).values())
    assert whole.history[1]["loss"] is None and whole.history[3]["loss"] > 0

    def dies(r):
        if r == 2:
            raise KeyboardInterrupt
        return poisoned(1, 3)(r)

    # Resumed between the two that are skipped.
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "again", [toy.spec("only", 12, batches=dies)])
    assert latest(tmp_path / "again").total == 3
    again = toy.run(tmp_path / "again", [toy.spec("only", 12, batches=poisoned(1, 3))])
    toy.assert_close(again.state, whole.state)
    assert untimed(again.history) == untimed(whole.history)


def test_a_skipped_update_changes_nothing_but_the_step(tmp_path):
    run = toy.run(tmp_path, [toy.spec("only", 4, batches=poisoned(1), ema_decay=0.9)])
    before = toy.run(tmp_path / "two", [toy.spec("only", 2, ema_decay=0.9)])
    toy.assert_close(run.state.networks, before.state.networks)
    assert int(run.state.step) == 4


@pytest.mark.parametrize("log_every", [1, 100])
def test_too_many_in_a_row_end_the_run_with_a_file_that_says_of_what(tmp_path, log_every):
    texts = lambda r: [f"prompt {r}.{i}" for i in range(toy.PROMPTS)]  # noqa: E731
    source = toy.source(batches=poisoned(2, 3, 4), texts=texts)
    with pytest.raises(NonFiniteError) as error:
        toy.run(tmp_path, [toy.spec("only", 20, pairs=source)], log_every=log_every, max_skipped=5)
    text = str(error.value)
    assert (
        "stage 'only', step 9: the loss, its gradient or the update was not finite 5 times" in text
    )
    assert "lower learning rate" in text and error.value.step == 9
    assert latest(tmp_path).total == 6  # all of them finite
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (report["stage"], report["stage_step"], report["step"]) == ("only", 9, 9)
    assert report["grad_norm"] == ["nan"] * 5 == report["loss"]
    assert len(report["prompts"]) == toy.BATCH
    assert {prompt.split(".")[0] for prompt in report["prompts"]} == {"prompt 4"}


def test_a_stage_that_never_moved_ends_the_run(tmp_path):
    """Of a finite loss and gradient: at this rate only the parameters overflow."""
    only = toy.spec("only", 1, optimizer=optax.sgd(1e39))
    with pytest.raises(NonFiniteError, match="'only', step 1: .*or the update was not finite 1 "):
        toy.run(tmp_path, [only], log_every=100)
    assert latest(tmp_path) is None


def test_the_prompts_of_a_mini_batch_are_those_that_its_pairs_were_made_of():
    source = toy.source(texts=lambda r: [str(100 * r + i) for i in range(toy.PROMPTS)])
    marked = lambda trainable, frozen, batch, keys: {  # noqa: E731
        "x": jnp.repeat(batch["conditioning"][:, 0], toy.PATHS)
    }
    stream = PairStream(dataclasses.replace(source, sample=marked, epochs=2))
    state = create(toy.trainable(), optax.sgd(0.1), jax.random.key(0))
    for step in (0, 3, 5):
        pairs = stream.next(step, state, toy.frozen())
        r = step // 4
        values = [toy.host_batch(r)["conditioning"][int(p) - 100 * r, 0]
                  for p in stream.prompts(step, state.key)]  # fmt: skip
        np.testing.assert_array_equal(pairs["x"], np.array(values, np.float32))


def test_an_error_of_the_disk_names_the_last_good_checkpoint(tmp_path):
    def full(position, state):
        if position.total == 5:
            raise OSError(errno.EROFS, "Read-only file system", "samples/5.png")

    with pytest.raises(
        OSError, match=r"Read-only .* samples/5.png; the last good .*points/4"
    ) as raised:
        toy.run(tmp_path, specs(), hooks=[loop.Hook(every=1, call=full)])
    assert raised.value.errno == errno.EROFS


def test_asked_to_stop_where_nothing_is_unsaved_it_ends_at_once_and_twice_anywhere():
    said = []
    with Preemption(at_once=True, end=said.append) as asked:
        asked.settle = lambda: said.append("settled")
        asked.unsaved = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.requested(1) and not said
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: said)
        assert said == ["asked to stop twice: ended at once; the same command resumes"]
    said.clear()
    with Preemption(at_once=True, end=said.append) as asked:
        asked.settle = lambda: said.append("settled")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: len(said) == 2)
        assert said[0] == "settled" and said[1].startswith("asked to stop: nothing was unsaved")


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


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
