"""Files and folders appear whole or not at all."""

import errno

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from tlcm_jax.io import files
from tlcm_jax.io.files import atomic_write, cast, save_tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "file"
    with atomic_write(target) as part:
        part.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content" and names(target.parent) == ["file"]


def test_what_was_there_stays_until_the_new_is_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), atomic_write(target, replace=True) as part:
        part.mkdir()
        (part / "new").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder"] and names(target) == ["old"]
    with atomic_write(target, replace=True) as part:
        part.mkdir()
        (part / "new").write_text("")
    assert names(tmp_path) == ["folder"] and names(target) == ["new"]


def test_another_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary").write_text("")
    with (
        pytest.raises(FileExistsError, match="already holds files"),
        atomic_write(tmp_path / "folder"),
    ):
        pass
    assert names(tmp_path / "folder") == ["diary"]


def test_leavings_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part" / "half").write_text("")
    with atomic_write(tmp_path / "folder") as part:
        part.mkdir()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == []


def test_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space left .* nothing was left behind") as error:  # noqa: SIM117
        with atomic_write(tmp_path / "folder") as part:
            part.mkdir()
            (part / "config.json").write_text("{}")
            save_tensors(part / "model.safetensors", {"a": np.zeros(3)})
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="cannot write .*file/folder"),
        atomic_write(tmp_path / "file" / "folder"),
    ):
        pass


def test_equal_tensors_make_equal_bytes(tmp_path):
    """Whatever the order they come in, and the order of the library's hash map, which is random."""
    tensors = {f"layer.{i}.weight": np.full((2, 3), i, np.float32) for i in range(20)}
    text = {f"key {i}": 'Grüße "\n\x1f\x7f\u2028 \U0001f431' for i in range(20)}
    for i in range(4):
        turn = dict(sorted(tensors.items(), reverse=i % 2 == 1))
        save_tensors(tmp_path / f"{i}.safetensors", turn, dict(reversed(text.items())))
    contents = {(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)}
    assert len(contents) == 1
    read = load_file(tmp_path / "0.safetensors")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value)
    with safe_open(tmp_path / "0.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", **text}


def test_cast_keeps_shape_and_order():
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert cast("x", value, "bf16").flags["C_CONTIGUOUS"]
    assert cast("x", np.float32(4), "fp16").shape == ()
    with pytest.raises(ValueError, match="dtype 'fp8' is not one of fp32, fp16, bf16"):
        cast("x", value, "fp8")
