"""Checkpoints: what is restored is what was saved, on any mesh, or an error says why not."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_regression as toy

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import sharding
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.optimizers import adamw
from tlcm_jax.training.positions import Position
from tlcm_jax.training.retention import Keep
from tlcm_jax.training.state import create


def make_state(on=None, trainable=None, seed=5, impl=None):
    trainable = toy.trainable() if trainable is None else trainable
    state = create(trainable, adamw(1e-2), jax.random.key(seed, impl=impl))
    filled = jax.tree.map(
        lambda x: x + 0.25 if x.dtype == jnp.float32 else x, state.student.opt_state
    )
    networks = {"student": state.student.replace(opt_state=filled)}
    return sharding.place(state.replace(networks=networks, step=jnp.int32(3)), on, toy.RULES)


def template(state, on=None):
    if on is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, state)
    else:
        shardings = sharding.tree_shardings(state, on, toy.RULES)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def save(saved, position, state):
    """And waits until it is on the disk."""
    saved.save(position, state)
    saved.wait()


def at(total):
    return Position(stage=1, name="second", step=total - 4, total=total)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    left, right = toy.values(left), toy.values(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_names_with_dots_and_both_key_kinds_come_back_exactly(tmp_path, impl):
    trainable = {
        "down_blocks.0": {"attentions.1": {"to_out.0": {"lora_A": jnp.linspace(0, 1, 7)}}},
        "down_blocks": {"0": {"attentions": {"1": jnp.arange(3.0)}}},
        "ff.net.0.proj": [jnp.float32(2.0), jnp.ones((2, 3))],
    }
    state = make_state(trainable=trainable, impl=impl)
    save(Checkpoints(tmp_path), at(7), state)
    again = Checkpoints(tmp_path)
    assert again.latest() == at(7)
    restored = again.restore(template(state))
    assert_same(restored, state)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)


def test_restores_onto_another_mesh(tmp_path):
    wide, mixed = (
        meshes.make_mesh({"fsdp": 8}),
        meshes.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4]),
    )
    state = make_state(wide)
    save(Checkpoints(tmp_path), at(5), state)
    for on in (mixed, None):
        restored = Checkpoints(tmp_path).restore(template(state, on))
        assert_same(restored, state)
        wanted = template(state, on)
        for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_the_trained_leaves_are_read_alone_beside_a_run_that_saves(tmp_path):
    saved = Checkpoints(tmp_path)
    for total in (5, 6):
        save(saved, at(total), make_state(meshes.make_mesh({"fsdp": 8}), seed=total))
    shutil.copytree(tmp_path / "6", tmp_path / "7.orbax-checkpoint-tmp")
    reader = Checkpoints(tmp_path, keep=None)
    for total in (None, 5):
        trained = reader.trained(total)
        assert jax.tree.structure(trained) == jax.tree.structure(toy.trainable())
        for leaf, value in zip(
            jax.tree.leaves(trained), jax.tree.leaves(toy.trainable()), strict=True
        ):
            assert isinstance(leaf, np.ndarray)
            np.testing.assert_array_equal(leaf, value)
    with pytest.raises(FileNotFoundError, match="no checkpoint 4 in .*it has 5, 6"):
        reader.trained(4)
    reader.close()
    assert sorted(os.listdir(tmp_path)) == ["5", "6", "7.orbax-checkpoint-tmp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it has none"):
        Checkpoints(tmp_path / "empty", keep=None).trained()


def test_the_newest_few_are_kept_and_half_written_ones_never_chosen(tmp_path):
    state = make_state()
    saved = Checkpoints(tmp_path, keep=Keep(last=2))
    for total in (5, 6, 7):
        saved.save(at(total), state)
    save(saved, at(7), state)  # already there
    assert sorted(os.listdir(tmp_path)) == ["6", "7"]
    # What a run that was killed while saving leaves: the temporary name.
    shutil.copytree(tmp_path / "7", tmp_path / "8.orbax-checkpoint-tmp")
    again = Checkpoints(tmp_path, keep=Keep(last=2))
    assert again.latest() == at(7)
    save(again, at(8), state)
    assert Checkpoints(tmp_path).latest() == at(8)
    with pytest.raises(RuntimeError, match="step 6 was not saved.*already holds step 8"):
        again.save(at(6), state)


# The reader that fails leaves its event loop to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_and_missing_checkpoints_are_errors(tmp_path):
    state = make_state()
    saved = Checkpoints(tmp_path)
    assert saved.latest() is None and saved.last_good().startswith("none yet in")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        saved.restore(template(state))
    saved.save(at(5), state)
    save(saved, at(6), state)
    for path in (tmp_path / "6/state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(RuntimeError, match=r"/6 cannot be read .*resume from step 5"):
        Checkpoints(tmp_path).restore(template(state))
    with pytest.raises(RuntimeError, match=r"/6 cannot be read .*has changed since"):
        Checkpoints(tmp_path, keep=None).trained(6)


def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(tmp_path, caplog):
    state = make_state()
    saved = Checkpoints(tmp_path)
    saved.save(at(5), state)
    save(saved, at(6), make_state(seed=6))
    (tmp_path / "6/position/metadata").write_bytes(b"")
    reader = Checkpoints(tmp_path, keep=None)
    reader.trained()  # of 5, and leaves all as it is
    assert reader.latest() == at(5) and sorted(os.listdir(tmp_path)) == ["5", "6"]
    caplog.clear()
    again = Checkpoints(tmp_path)
    assert again.latest() == at(5)
    assert_same(again.restore(template(state)), state)
    said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(said) == 1 and "/6 is damaged (position/metadata has changed" in said[0]
    assert sorted(os.listdir(tmp_path)) == ["5", "6.damaged"]
    save(again, at(6), state)  # trained again
    assert Checkpoints(tmp_path).latest() == at(6)
    for total in ("5", "6"):
        (tmp_path / total / "state/manifest.ocdbt").unlink()
    with pytest.raises(RuntimeError, match=r"can be read .6: state/manifest.ocdbt is missing"):
        Checkpoints(tmp_path).latest()
    assert {"5", "6"} <= set(os.listdir(tmp_path))


def test_checkpoints_of_versions_without_sums_are_taken_with_a_warning(tmp_path, caplog):
    state = make_state()
    saved = Checkpoints(tmp_path)
    saved.save(at(5), state)
    save(saved, at(6), state)
    for total in "56":
        (tmp_path / total / "SHA256SUMS").unlink()
    assert Checkpoints(tmp_path).latest() == at(6) and "6 has no SHA256SUMS" in caplog.text
    (tmp_path / "6/position/metadata").write_text('{"stage": 1')
    assert Checkpoints(tmp_path).latest() == at(5)


def test_a_run_that_is_killed_before_the_last_two_files_are_listed_has_a_list(tmp_path):
    saved, state = Checkpoints(tmp_path), make_state()
    saved.save(at(5), state)
    saved._manager.wait_until_finished()  # named, and `wait` was never called
    text = (tmp_path / "5/SHA256SUMS").read_text()
    assert "state/manifest.ocdbt" in text and "_CHECKPOINT_METADATA" not in text
    (tmp_path / "5/SHA256SUMS.part").write_text("killed while it wr")
    assert Checkpoints(tmp_path).latest() == at(5)
    assert not (tmp_path / "5/SHA256SUMS.part").exists()
    saved.wait()
    assert "_CHECKPOINT_METADATA" in (tmp_path / "5/SHA256SUMS").read_text()


def test_the_keep_policy_holds_on_the_disk_and_over_a_resume(tmp_path):
    keep = Keep(last=1, every=4, stage_ends=True, best="loss")
    losses = {5: 3.0, 6: 1.0, 7: 2.0, 8: 5.0, 9: float("nan"), 10: 4.0}
    for total, loss in losses.items():
        saved = Checkpoints(tmp_path, keep=keep)
        saved.latest()
        saved.save(at(total), make_state(), stage_end=total == 7, row={"loss": loss})
        saved.wait()
    assert sorted(map(int, os.listdir(tmp_path))) == [6, 7, 8, 10]


def test_another_state_is_refused_leaf_by_leaf(tmp_path):
    save(Checkpoints(tmp_path), at(5), make_state())
    layer = {"kernel": jnp.ones((toy.FEATURES, 4)), "scale": jnp.ones(4)}
    other = make_state(trainable={"down_blocks.0": {"attn.1": layer}})
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path).restore(template(other))
    text = str(error.value)
    assert "networks/student/params/down_blocks.0/attn.1/scale: not in the checkpoint" in text
    assert "networks/student/params/down_blocks.0/attn.1/bias: only in the checkpoint" in text
    assert "float32[16, 8] in the checkpoint, float32[16, 4] in this run" in text
    counted = make_state()
    counted = counted.replace(step=jnp.float32(0))
    with pytest.raises(ValueError, match=r"step: int32\[\] in the checkpoint, float32\[\]"):
        Checkpoints(tmp_path).restore(template(counted))


def test_two_leaves_of_one_name_are_refused(tmp_path):
    state = make_state(trainable={"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    with pytest.raises(ValueError, match="two leaves .* called 'networks/student/params/a/b'"):
        Checkpoints(tmp_path).save(at(5), state)


COMMIT = "orbax.checkpoint._src.checkpointers.async_checkpointer._on_commit_callback"
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: Error writing ...: No space left on device [28]"),
]


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_names_the_last_good_checkpoint(tmp_path, monkeypatch, error):
    saved, state = Checkpoints(tmp_path), make_state()
    save(saved, at(5), state)
    monkeypatch.setattr(saved._manager, "save", raising(error))
    with pytest.raises(OSError, match=rf"no space left .*step 6.*{tmp_path}/5: free") as raised:
        saved.save(at(6), state)
    assert raised.value.errno == errno.ENOSPC
    assert_same(Checkpoints(tmp_path).restore(template(state)), state)
    monkeypatch.setattr(saved._manager, "save", raising(KeyError(1)))
    with pytest.raises(KeyError):
        saved.save(at(6), state)
    monkeypatch.setattr(saved._manager, "save", lambda *args, **kwargs: False)
    with pytest.raises(RuntimeError, match="declined to save step 6"):
        saved.save(at(6), state)


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("call", ["wait", "save"])
def test_a_disk_that_fills_up_in_the_background_is_said_by_the_next_call(
    tmp_path, monkeypatch, error, call
):
    saved, state = Checkpoints(tmp_path), make_state()
    save(saved, at(5), state)
    with monkeypatch.context() as patch:
        # The commit is the background's last act: until then the files have a temporary name.
        patch.setattr(COMMIT, raising(error))
        saved.save(at(6), state)
        with pytest.raises(OSError, match=rf"checkpoint of step 6; .*{tmp_path}/5: free") as raised:
            saved.wait() if call == "wait" else saved.save(at(7), state)
    assert raised.value.errno == errno.ENOSPC
    again = Checkpoints(tmp_path)
    assert again.latest() == at(5)
    save(again, at(6), state)
    assert Checkpoints(tmp_path).latest() == at(6)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    """What is written is what it was, although its memory is another's at once."""
    big = {"w": jnp.arange(2.0**20), "b": jnp.zeros(3)}
    state = make_state(trainable=big)
    expected = toy.values(state)
    spoil = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1 if x.dtype == jnp.float32 else x, s),
        donate_argnums=0,
    )
    spoil(make_state(trainable=big))  # compiled before, so that it does not wait
    saved = Checkpoints(tmp_path)
    saved.save(at(5), state)
    spoil(state)
    saved.wait()
    restored = Checkpoints(tmp_path).restore(template(make_state(trainable=big)))
    for name, value in toy.values(restored).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_the_last_good_checkpoint_is_a_whole_one(tmp_path):
    saved, state = Checkpoints(tmp_path), make_state()
    assert saved.last_good().startswith("none yet in")
    for total in (9, 10):
        save(saved, at(total), state)
    shutil.copytree(tmp_path / "9", tmp_path / "11.orbax-checkpoint-tmp")
    assert saved.last_good() == str(tmp_path / "10")  # by number, not by name
