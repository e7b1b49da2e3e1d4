"""Tarballs that are missing, damaged or not what they should be are named."""

import json
import tarfile

import pytest

from miniature import emoji, tarballs
from tests.support.icons import write_tarball, write_world


def test_missing_tarball_names_the_command(tmp_path):
    with pytest.raises(SystemExit, match=r"emojibase-data.* is missing: .*fetch\.sh"):
        emoji.main(["--manual_dir", str(tmp_path), "--output", str(tmp_path / "a.npz")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"not an archive", b""])
def test_tarball_that_is_none(world, damage):
    (world / tarballs.IMAGES["noto"]).write_bytes(damage)
    with pytest.raises(ValueError, match=r"iconify-json-noto-1.2.9.tgz is not a whole gzip tar"):
        emoji.Collection(world)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_tarball_cut_short(world, share):
    path = world / tarballs.IMAGES["fluent-3d"]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="is not a whole gzip tar archive"):
        list(emoji.Collection(world).records())


@pytest.mark.parametrize(
    ("noto", "message"),
    [
        ({"readme": b"x"}, "holds no package/icons.json"),
        ({"icons.json": b"{", "chars.json": b"{}"}, "icons.json is not JSON"),
        ({"icons.json": b"{}", "chars.json": b"[]"}, "is not an Iconify set"),
        ({"icons.json": b"[]", "chars.json": b"{}"}, "is not an Iconify set"),
    ],
)
def test_wrong_contents(tmp_path, noto, message):
    with pytest.raises(ValueError, match=message):
        emoji.Collection(write_world(tmp_path, noto=noto))


def test_label_entry_without_a_field(tmp_path):
    world = write_world(tmp_path, labels=[{"label": "red apple", "group": 4}])
    with pytest.raises(ValueError, match=r"data.json lacks a field \(KeyError\('hexcode'\)\)"):
        emoji.Collection(world)


@pytest.mark.parametrize(
    ("icon", "message"),
    [({"body": "<path"}, "the SVG does not parse"), ({}, "has no body"), (None, "does not hold")],
)
def test_bad_icon_is_named(tmp_path, icon, message):
    icons = {} if icon is None else {"red-apple": icon}
    files = {
        "icons.json": json.dumps({"icons": icons}).encode(),
        "chars.json": b'{"1f34e": "red-apple"}',
    }
    collection = emoji.Collection(write_world(tmp_path, noto=files))
    with pytest.raises(ValueError, match=rf"noto 1f34e \(red apple\): .*{message}"):
        list(collection.records())


def test_bad_webp_is_named(world):
    write_tarball(world / tarballs.IMAGES["fluent-3d"], {"assets/1f34e.webp": b"RIFF"})
    with pytest.raises(ValueError, match=r"fluent-3d 1f34e \(red apple\): not a readable picture"):
        list(emoji.Collection(world).records())


def test_links_in_an_archive_are_no_files(tmp_path):
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("package/en/data.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(ValueError, match="holds no package/en/data.json"):
        tarballs.Tarball(path).json("en/data.json")
