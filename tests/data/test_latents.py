"""Files of real latents: what is read back, and what is refused."""

import numpy as np
import pytest

from tlcm_jax.data.latents import read_latents

SHAPE = (4, 4, 2)


def write(path, latents=None, captions=("a cat", "été", "a dog"), **more):
    latents = np.arange(96, dtype=np.float16).reshape(3, *SHAPE) if latents is None else latents
    np.savez(path, latents=latents, captions=np.array(captions), **more)
    return path


def test_what_is_written_is_read(tmp_path):
    found = read_latents(write(tmp_path / "a.npz", extra=np.zeros(2)), SHAPE)
    assert found.captions == ("a cat", "été", "a dog")
    assert found.latents.dtype == np.float16 and found.latents[2, 3, 3, 1] == 95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(captions=("a", "b")), r"3 latents and captions \[2\]"),
        (dict(captions=(1, 2, 3)), "needs one text each"),
        (dict(captions=(("a", "b"),) * 3), "needs one text each"),
        (dict(latents=np.zeros((3, 8, 8, 2))), r"are \[3, 8, 8, 2\], the model's \[n, 4, 4, 2\]"),
        (dict(latents=np.zeros((0, *SHAPE)), captions=()), r"are \[0, 4, 4, 2\]"),
        (dict(latents=np.full((3, *SHAPE), np.nan)), "not all finite"),
        (dict(latents=np.zeros((3, *SHAPE), np.int32)), "not all finite numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_latents(write(tmp_path / "a.npz", **changes), SHAPE)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="latents .*nowhere.npz does not exist"):
        read_latents(tmp_path / "nowhere.npz", SHAPE)
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "half.npz", latents=np.zeros((1, *SHAPE)))
    objects = np.array([{}, {}, {}], dtype=object)
    np.savez(tmp_path / "pickled.npz", latents=np.zeros((3, *SHAPE)), captions=objects)
    for name in ("text", "half", "pickled"):
        with pytest.raises(ValueError, match="is no .npz of `latents` and `captions`"):
            read_latents(tmp_path / f"{name}.npz", SHAPE)
