"""Inputs in buckets, against fsspec's store in memory in the place of Google's."""

import shutil

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tlcm_jax.data.prompts import read_prompts
from tlcm_jax.io import buckets
from tlcm_jax.io.lora_sources import find_lora
from tlcm_jax.io.sources import Source
from tlcm_jax.paths import MINIATURE


class Store(MemoryFileSystem):
    """A bucket; `opened` counts what was read, and `fails` stands for what a store answers."""

    protocol = ("gs",)
    opened: list[str] = []
    fails: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def find(self, *args, **options):
        if Store.fails is not None:
            raise Store.fails
        return super().find(*args, **options)

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            Store.opened.append(path)
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    fsspec.register_implementation("gs", Store, clobber=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    monkeypatch.setattr(Store, "opened", [])
    monkeypatch.setattr(Store, "fails", None)
    yield fsspec.filesystem("gs")
    fsspec.register_implementation("gs", "gcsfs.GCSFileSystem", clobber=True)


def test_other_paths_are_left_alone(tmp_path):
    assert buckets.local(tmp_path) == tmp_path and not buckets.is_bucket("gs/prompts.txt")


def test_prompts_are_read_and_fetched_again_only_when_they_changed(bucket):
    bucket.pipe("mine/data/prompts.txt", b"a fox\na cat\n")
    bucket.pipe("mine/data/table.csv", b"n,says\n1,a hare\n")
    given = ["gs://mine/data/prompts.txt", "gs://mine/data/table.csv:says"]
    assert read_prompts(given) == ["a fox", "a cat", "a hare"]
    assert read_prompts(given) == ["a fox", "a cat", "a hare"]
    assert len(Store.opened) == 2
    bucket.pipe("mine/data/prompts.txt", b"an owl\n")
    assert read_prompts(given) == ["an owl", "a hare"]
    assert len(Store.opened) == 3


def test_a_copy_that_was_broken_off_is_no_copy(bucket, tmp_path, monkeypatch):
    bucket.pipe("mine/prompts.txt", b"a fox\n")

    def broken(source, into, size):
        into.write(b"a f")
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(buckets.shutil, "copyfileobj", broken)
        with pytest.raises(ValueError, match="gs://mine/prompts.txt could not be fetched: reset"):
            read_prompts(["gs://mine/prompts.txt"])
    assert not list(tmp_path.rglob("*prompts.txt*"))
    assert read_prompts(["gs://mine/prompts.txt"]) == ["a fox"]


def test_a_model_is_read_from_a_bucket_without_its_pickles(bucket, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE / "shapes-xl", folder, ignore=shutil.ignore_patterns("vocab.json"))
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"no")
    bucket.put(str(folder), "mine/models/shapes", recursive=True)
    source = Source.find("gs://mine/models/shapes", lambda path: None)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (source.folder / weights).read_bytes() == (folder / weights).read_bytes()
    assert not [name for name in Store.opened if name.endswith(".bin")]


def test_a_lora_is_found_in_a_bucket(bucket):
    bucket.pipe("mine/lora.safetensors", b"x")
    path, config = find_lora("gs://mine/lora.safetensors")
    assert path.read_bytes() == b"x" and config is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "gs://mine/none.txt does not exist: the bucket holds no file"),
        (FileNotFoundError("no bucket"), "gs://mine/none.txt does not exist"),
        (PermissionError("403 forbidden"), "403 forbidden; log in .*gcloud auth"),
        (ImportError("Install gcsfs"), r"Install gcsfs .pip install -e .*gcs"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(bucket, error, message):
    Store.fails = error
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        read_prompts(["gs://mine/none.txt"])
    assert "\n" not in str(raised.value)


def test_an_object_may_not_leave_the_folder_of_copies(bucket, monkeypatch):
    monkeypatch.setattr(Store, "find", lambda *a, **o: {"mine/../../x.txt": {"size": 1}})
    with pytest.raises(ValueError, match="an object is called"):
        buckets.local("gs://mine")
