"""What a run was begun with: known by content, wherever it lies."""

import json
import shutil
import types

import pytest

from tlcm_jax.config import inputs
from tlcm_jax.config.inputs import Inputs

TEXTS = ["a cat", "a dog"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "find_family", lambda path: (None, tmp_path / path))
    for name in (
        "unet/model.safetensors",
        "tokenizer/vocab.json",
        "unet/notes.md",
        "big.safetensors",
    ):
        path = tmp_path / "teacher" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "latents.npz").write_bytes(b"latents")
    (tmp_path / "run").mkdir()
    return tmp_path


def given(world, prompts=TEXTS, teacher="teacher", latents="latents.npz"):
    settings = types.SimpleNamespace(
        latents=str(world / latents),
        model=types.SimpleNamespace(path=teacher, loras=(), controls={}),
    )
    return Inputs(world / "run", settings, prompts)


def begin(world):
    first = given(world)
    first.check()
    assert first.moved == ()
    first.write()


def test_the_same_content_at_another_place_is_the_same(world):
    begin(world)
    shutil.copytree(world / "teacher", world / "copy")
    shutil.copy(world / "latents.npz", world / "other.npz")
    again = given(world, teacher="copy", latents="other.npz")
    again.check()
    assert set(again.moved) == {
        "prompts", "latents", "model.path", "model.loras", "model.controls",
    }  # fmt: skip


def test_other_content_under_the_same_path_is_refused_by_name(world):
    begin(world)
    with pytest.raises(ValueError, match="the prompts of the run in .* changed after it began"):
        given(world, prompts=TEXTS[::-1]).check()
    (world / "teacher/unet/model.safetensors").write_text("unet/model.safetensorz")
    (world / "latents.npz").write_bytes(b"latenta")
    changed = given(world)
    with pytest.raises(ValueError, match="the latents and the teacher of the run"):
        changed.check()
    assert changed.moved == ("prompts", "model.loras", "model.controls")
    (world / "run/inputs.json").unlink()
    begin(world)


def test_files_that_are_no_part_of_the_teacher_do_not_count_and_none_is_read_twice(
    world, monkeypatch
):
    begin(world)
    (world / "teacher/unet/notes.md").write_text("other")
    (world / "teacher/big.safetensors").write_text("other")
    read = []
    real = inputs._hash_file
    monkeypatch.setattr(inputs, "_hash_file", lambda path: read.append(path.name) or real(path))
    given(world).check()
    assert read == ["latents.npz"]
    (world / "teacher/unet/new.safetensors").write_text("a shard more")
    with pytest.raises(ValueError, match="the teacher of the run"):
        given(world).check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"teacher": 1}', '{"teacher": {"a": [1]}}'])
def test_a_damaged_file_is_said_and_stops_nothing_it_need_not(world, text, caplog):
    (world / "run/inputs.json").write_text(text)
    again = given(world)
    if text.startswith('{"'):
        with pytest.raises(ValueError, match="the teacher of the run"):
            again.check()
        return
    again.check()
    assert "not known any more" in caplog.text
    again.write()
    assert set(json.loads((world / "run/inputs.json").read_text())) == set(inputs.KEYS)
