"""Stored pairs: by index, resumable, and refused where they are not what is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlcm_jax.data import pair_store
from tlcm_jax.data.pair_store import PairStore

FIELDS = {
    "z_m": jax.ShapeDtypeStruct((6, 4, 4, 2), jnp.float32),
    "t_m": jax.ShapeDtypeStruct((6,), jnp.int32),
}


def create(folder, described=None, **changes):
    options = dict(refills=3, fields=FIELDS, chunk=2) | changes
    return PairStore.create(str(folder), described or {"a": (1, 2)}, **options)


def drawn(seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((6, 4, 4, 2)).astype(np.float32)
    return {"z_m": z, "t_m": rng.integers(0, 1000, 6).astype(np.int32)}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 2**-8)])
def test_what_is_written_is_read(tmp_path, dtype, error):
    store = create(tmp_path / "p", dtype=dtype)
    made = drawn(0)
    # Two hosts, each its own rows.
    for rows in (slice(4, 6), slice(0, 4)):
        store.write(2, rows.start, {name: array[rows] for name, array in made.items()})
    store.mark(2)
    again = PairStore(str(tmp_path / "p"))
    assert again.done == {2} and again.described == {"a": [1, 2]}
    found = again.read(2)
    assert found["z_m"].dtype == np.float32
    np.testing.assert_array_equal(found["t_m"], made["t_m"])
    np.testing.assert_allclose(found["z_m"], made["z_m"], rtol=error, atol=0)
    np.testing.assert_array_equal(again.read(2, slice(2, 4))["t_m"], made["t_m"][2:4])


def test_it_is_told_what_is_missing(tmp_path):
    store = create(tmp_path / "p")
    store.mark(1)
    assert create(tmp_path / "p").done == {1}  # the same recipe goes on
    with pytest.raises(ValueError, match="holds 1 of 3 refills: run the command"):
        store.check_whole()
    store.mark(0)
    store.mark(2)
    store.check_whole()


def test_pairs_of_another_recipe_are_not_gone_on_with(tmp_path):
    create(tmp_path / "p")
    with pytest.raises(ValueError, match="pairs of another recipe \\(other described\\)"):
        create(tmp_path / "p", {"a": 2})
    with pytest.raises(ValueError, match="other refills"):
        create(tmp_path / "p", refills=4)
    with pytest.raises(ValueError, match="--dtype 'int8': must be one of"):
        create(tmp_path / "q", dtype="int8")


def test_a_folder_without_pairs_or_with_a_damaged_index_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        PairStore(str(tmp_path))
    (tmp_path / "pairs.json").write_text("[1")
    with pytest.raises(ValueError, match="damaged"):
        PairStore(str(tmp_path))


def test_buckets_are_tensorstore_s_own(tmp_path, monkeypatch):
    spec = pair_store._spec
    assert spec("gs://bucket/a/b") == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    # A bucket that is a folder here: whatever is written and read goes through the one name.
    stand_in = {"driver": "file", "path": f"{tmp_path}/bucket/"}
    monkeypatch.setattr(pair_store, "_spec", lambda folder: stand_in)
    create("gs://bucket/a").mark(0)
    assert PairStore("gs://bucket/a").done == {0}
    assert (tmp_path / "bucket" / "pairs.json").is_file()


def test_what_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot use the pairs in .*file/p: ") as told:
        create(tmp_path / "file" / "p")
    assert "\n" not in str(told.value)
