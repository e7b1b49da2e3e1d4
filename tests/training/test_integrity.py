"""Sums of a checkpoint's files: whatever happens to any of them is noticed."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.training import integrity
from tlcm_jax.training.checkpoints import Checkpoints
from tlcm_jax.training.optimizers import adamw
from tlcm_jax.training.positions import Position
from tlcm_jax.training.state import create

FLIPS = 8  # a file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a small state, as a run leaves it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    state = create({"w": jnp.linspace(0, 1, 999)}, adamw(1e-2), jax.random.key(0))
    checkpoints = Checkpoints(directory)
    checkpoints.save(Position(0, "only", 7, 7), state)
    checkpoints.close()
    return directory / "7"


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_what_was_saved_is_whole_for_coreutils_too(saved):
    assert integrity.damage(saved) == ""
    assert len(files(saved)) == 1 + len((saved / "SHA256SUMS").read_text().splitlines())
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=saved, check=True)


def test_every_flipped_bit_of_every_file_is_noticed(saved, tmp_path):
    rng = np.random.default_rng(0)
    for name in files(saved):
        whole = (saved / name).read_bytes()
        for bit in rng.integers(0, 8 * len(whole), FLIPS):
            copy = tmp_path / "copy"
            shutil.copytree(saved, copy)
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << (bit % 8)
            (copy / name).write_bytes(flipped)
            assert integrity.damage(copy), f"bit {bit} of {name}"
            shutil.rmtree(copy)


def test_every_file_cut_emptied_removed_or_added_is_noticed(saved, tmp_path):
    for name in files(saved):
        for harm in ("cut", "empty", "remove"):
            copy = tmp_path / "copy"
            shutil.copytree(saved, copy)
            content = (copy / name).read_bytes()
            if harm == "remove":
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(content[: len(content) - 1 if harm == "cut" else 0])
            assert integrity.damage(copy), f"{harm} {name}"
            assert integrity.has_sums(copy) == (name.name != "SHA256SUMS" or harm != "remove")
            shutil.rmtree(copy)
    shutil.copytree(saved, tmp_path / "more")
    (tmp_path / "more/state/d/other").write_bytes(b"x")
    assert integrity.damage(tmp_path / "more") == "state/d/other is not of it"
