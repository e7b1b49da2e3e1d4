"""The emoji reader, its prompts and its dataset, on tarballs made here."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from miniature import captions, emoji, prompts, tarballs
from tests.support.icons import half_red, icon_set, write_tarball, write_world


def test_join_drops_fe0f_tones_and_ungrouped(world):
    found = emoji.Collection(world).emoji
    assert [(e.hexcode, e.styles) for e in found] == [
        ("1f34e", tarballs.STYLES),
        ("1f44b", ("fluent-3d", "noto", "fluent-flat")),
        ("1f999", ("twemoji",)),
        ("2764", tarballs.STYLES),
    ]
    apple = found[0]
    assert (apple.label, apple.label_zh) == ("red apple", "zh red apple")
    assert (apple.tags, apple.group) == (("fruit",), "food-drink")
    assert found[1].tags == ()


def test_tone_swatches_are_not_variants():
    assert emoji._is_toned("1f44b-1f3fb") and not emoji._is_toned("1f3fb")


def test_records_are_whole_and_in_order(world):
    collection = emoji.Collection(world)
    records = list(collection.records())
    assert [(r.emoji, r.style) for r in records] == collection.pairs()
    assert len(records) == 12
    for record in records:
        assert record.image.shape == (128, 128, 3) and record.image.dtype == np.uint8
        assert record.captions == captions.captions(record.emoji.label, record.style)
        assert not (record.composition and record.heldout)
    train = list(collection.records(composition=False))
    held = list(collection.records(composition=True))
    assert len(train) + len(held) == 12
    assert all(r.composition for r in held) and not any(r.composition for r in train)


def test_npz_command(world, tmp_path, capsys):
    output = tmp_path / "emoji.npz"
    emoji.main(["--manual_dir", str(world), "--output", str(output), "--size", "16"])
    assert "12 pictures of 4 objects, 2 in all 4 styles" in capsys.readouterr().out
    data = np.load(output)
    documented = {line.split()[0] for line in emoji.__doc__.splitlines() if " [" in line[:26]}
    assert set(data) == documented
    assert data["images"].shape == (12, 16, 16, 3) and data["images"].dtype == np.uint8
    assert data["captions"].shape == (12, 3)
    i = int(np.flatnonzero(data["captions"][:, 0] == "a Twemoji sticker of a llama")[0])
    assert data["class_labels"][data["class_ids"][i]] == "llama"
    assert data["style_names"][data["style_ids"][i]] == "twemoji"
    assert (data["images"][i] == (0, 0, 255)).all()
    assert list(tmp_path.glob("*.partial")) == []


def test_npz_command_refuses_sizes(world, tmp_path):
    with pytest.raises(SystemExit):
        emoji.main(["--manual_dir", str(world), "--output", str(tmp_path / "a"), "--size", "256"])


def test_prompt_files(tmp_path):
    """On a world of a hundred labelled hearts, so that every file has lines."""
    labels = [
        {"hexcode": f"{0x1F300 + i:X}", "label": f"heart {i:03d}", "group": 8} for i in range(100)
    ]
    codes = [entry["hexcode"].lower() for entry in labels]
    write_world(tmp_path, labels=labels)
    picture = half_red()
    write_tarball(
        tmp_path / tarballs.IMAGES["fluent-3d"], {f"assets/{c}.webp": picture for c in codes}
    )
    for style in tarballs.STYLES[1:]:
        write_tarball(tmp_path / tarballs.IMAGES[style], icon_set({c: c for c in codes}, 8))
    output = tmp_path / "prompts"
    for _ in range(2):  # the second run must write the same
        prompts.main(["--manual_dir", str(tmp_path), "--output", str(output)])
        first = {p.name: p.read_bytes() for p in output.iterdir()}
    collection = emoji.Collection(tmp_path)
    assert first == {k: v.encode() for k, v in prompts.prompt_files(collection).items()}

    lines = {p.stem: p.read_text("utf-8").splitlines() for p in output.glob("*.txt")}
    assert {name: len(text) for name, text in lines.items()} == {
        "train": 400 - 20 - 20, "composition": 20, "heldout": 20
    }  # fmt: skip
    everything = {
        text: (e.hexcode, style)
        for e, style in collection.pairs()
        for text in captions.captions(e.label, style)
    }
    named = {name: {everything[t] for t in text} for name, text in lines.items()}
    assert named["composition"] == collection.composition
    assert named["heldout"] == collection.heldout
    assert named["train"] == set(everything.values()) - named["composition"] - named["heldout"]
    for name in ("heldout", "composition"):
        entries = json.loads((output / f"{name}.json").read_text("utf-8"))
        assert [entry["prompt"] for entry in entries] == lines[name]
        for entry in entries:
            assert everything[entry["prompt"]] == (entry["hexcode"], entry["style"])
            assert collection.emoji[entry["class_id"]].label == entry["label"]
            assert tarballs.STYLES[entry["style_id"]] == entry["style"]


def test_dataset_builder(tmp_path):
    """As a data source, in a process of its own that must not have imported TensorFlow."""
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    manual = tmp_path / "tarballs"
    manual.mkdir()
    write_world(manual)
    script = """
import json, sys
import tensorflow_datasets as tfds
from miniature.emoji_dataset_builder import EmojiStyles

manual_dir, data_dir = sys.argv[1:]
builder = EmojiStyles(data_dir=data_dir, file_format="array_record")
builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
rows = []
for split in ("train", "composition"):
    for row in builder.as_data_source(split):
        image = row["image"]
        rows.append([
            split, row["hexcode"].decode(), builder.info.features["style"].int2str(row["style"]),
            row["caption"].decode(), [c.decode() for c in row["captions"]],
            row["label_zh"].decode(), [t.decode() for t in row["tags"]],
            builder.info.features["group"].int2str(row["group"]),
            str(image.dtype), image.shape, int(image.astype(int).sum())])
print(json.dumps({"rows": rows, "tensorflow": "tensorflow" in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(manual), str(tmp_path / "data")],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["tensorflow"]
    expected = [
        [
            "composition" if r.composition else "train", r.emoji.hexcode, r.style,
            r.captions[0], list(r.captions), r.emoji.label_zh, list(r.emoji.tags), r.emoji.group,
            "uint8", [128, 128, 3], int(r.image.astype(int).sum()),
        ]
        for r in emoji.Collection(manual).records()
    ]  # fmt: skip
    assert sorted(result["rows"]) == sorted(expected)
