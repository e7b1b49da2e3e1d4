"""Files and folders appear whole or not at all."""

import errno

import numpy as np
import pytest
from safetensors import SafetensorError

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


def test_cast_keeps_shape_and_order():
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert cast("x", value, "bf16").flags["C_CONTIGUOUS"]
    assert cast("x", np.float32(4), "fp16").shape == ()
    with pytest.raises(ValueError, match="dtype 'fp8' is not one of fp32, fp16, bf16"):
        cast("x", value, "fp8")
