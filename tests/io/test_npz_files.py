"""Arrays from numpy's files: read as numpy reads them; refused before memory is taken for them."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from tlcm_jax.io.npz_files import read_npy, read_npz


def header(descr, shape, fortran=False):
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    rng = np.random.default_rng(0)
    arrays = {
        "halves": rng.normal(size=(2, 3, 4)).astype(np.float16),
        "columns": np.asfortranarray(rng.normal(size=(3, 2))),
        "texts": np.array(["a", "a longer one"]),
        "whole": np.arange(5, dtype=">i4"),
        "none": np.zeros((0, 3)),
        "one": np.array(2.0),
    }
    save(tmp_path / "x.npz", **arrays)
    found = read_npz(tmp_path / "x.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert list(read_npz(tmp_path / "x.npz", ["one"])) == ["one"]
    np.save(tmp_path / "x.npy", arrays["columns"])
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy"), arrays["columns"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("<f4", (10**12,)), "which the file cannot hold"),
        (header("<f4", (2**62, 2**62)), "which the file cannot hold"),
        (header("<U200000000", (1,)), "which the file cannot hold"),
        (header("<f4", (-1,)), "has a shape"),
        (header("<f4", (True,)) + bytes(4), "has a shape"),
        (header("|O", (1,)) + b"\x80\x04N.", "pickles"),
        (header("<f4", (4,)) + bytes(15), "cannot hold|cut short"),
        (b"\x93NUMPY\x01\x00\x05\x00" + b"((((\n", "header of x is damaged"),
        (b"\x93NUMPY\x09\x00", "format"),
        (b"nonsense", "magic string"),
    ],
)
def test_a_member_that_lies(tmp_path, content, message):
    path = write_zip(tmp_path / "x.npz", {"x.npy": content})
    with pytest.raises(ValueError, match=message) as error:
        read_npz(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_nothing_is_allocated_for_what_is_not_there(tmp_path):
    """A deflated gigabyte of zeros in a file of one megabyte."""
    packed = tmp_path / "x.npz"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as member:
            member.write(header("<f4", (2**28,)))
            for _ in range(64):
                member.write(bytes(2**24))
    assert packed.stat().st_size < 2 * 2**20
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="which the file cannot hold"):
            read_npz(packed)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_what_is_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.npz does not exist"):
        read_npz(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="no .npz file that can be read"):
        read_npz(tmp_path / "x.npz")
    whole = io.BytesIO()
    np.savez(whole, a=np.zeros(3))
    (tmp_path / "x.npz").write_bytes(whole.getvalue())
    with pytest.raises(ValueError, match="it has no array 'b'"):
        read_npz(tmp_path / "x.npz", ["a", "b"])
