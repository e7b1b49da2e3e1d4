"""The emoji reader, its splits, captions, prompts and dataset, on tarballs made here."""

import collections
import io
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from miniature import captions, emoji, prompts, rasters, splits, tarballs

SQUARE = '<path fill="#00f" d="M0 0h{0}v{0}H0z"/>'
# Two objects with every style, one with an FE0F, one with a tone variant, and two that must drop.
LABELS = [
    {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit"], "group": 4},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
    {"hexcode": "1F44B", "label": "waving hand", "group": 1, "skins": [{"hexcode": "1F44B-1F3FB"}]},
    {"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone", "group": 1},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
    {"hexcode": "1F999", "label": "llama", "tags": [], "group": 3},
]


def write_tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def webp(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="WEBP", lossless=True, exact=True)
    return stream.getvalue()


def half_red():
    """Left half opaque red; right half fully transparent, of a colour that must not show."""
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[:, :128] = (255, 0, 0, 255)
    pixels[:, 128:] = (0, 255, 0, 0)
    return webp(pixels)


def icon_set(names, size, **extra):
    icons = {name: {"body": SQUARE.format(size)} for name in names.values()} | extra
    return {
        "icons.json": json.dumps({"icons": icons, "width": size, "height": size}).encode(),
        "chars.json": json.dumps(names).encode(),
    }


def write_world(folder, labels=LABELS, noto=None):
    chinese = [entry | {"label": f"zh {entry['label']}"} for entry in labels]
    write_tarball(
        folder / tarballs.LABELS,
        {
            "en/data.json": json.dumps(labels).encode(),
            "zh/data.json": json.dumps(chinese).encode(),
        },
    )
    write_tarball(
        folder / tarballs.IMAGES["fluent-3d"],
        {
            f"assets/{code}.webp": half_red()
            for code in ("1f34e", "2764-fe0f", "1f44b", "1f44b-1f3fb", "1f1e6")
        },
    )
    names = {"1f34e": "red-apple", "2764": "red-heart", "1f44b": "waving-hand"}
    toned = names | {"1f44b-1f3fb": "waving-hand-light-skin-tone", "1fabc": "unlabelled"}
    write_tarball(folder / tarballs.IMAGES["noto"], noto or icon_set(toned, 128))
    write_tarball(folder / tarballs.IMAGES["fluent-flat"], icon_set(names, 32))
    write_tarball(
        folder / tarballs.IMAGES["twemoji"],
        icon_set({"1f34e": "red-apple", "2764-fe0f": "red-heart", "1f999": "llama"}, 36),
    )
    return folder


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


def many_styles(count):
    """An index of `count` objects, of which every fifth has two styles only."""
    return {
        f"{0x1F300 + i:x}": tarballs.STYLES[:2] if i % 5 == 0 else tarballs.STYLES
        for i in range(count)
    }


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


def test_webp_is_composited_on_white_before_resizing():
    image = rasters.from_webp(half_red())
    # Lanczos reaches three pixels to either side of the edge at column 64.
    assert (image[:, :61] == (255, 0, 0)).all() and (image[:, 67:] == 255).all()
    # Red fades into white there: the hidden green never darkens the red channel.
    assert (image[..., 0] == 255).all()


def test_webp_half_opacity():
    pixels = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert np.abs(rasters.from_webp(webp(pixels), 8).astype(int) - 127).max() <= 1


def test_svg_is_on_white_and_centred():
    image = rasters.from_svg(SQUARE.format(32), (0, 0, 32, 64))
    # 32 x 64 in a square of 64: 16 units, 32 pixels of margin left and right, blue in the top half.
    assert (image[:, :32] == 255).all() and (image[:, 96:] == 255).all()
    assert (image[:64, 32:96] == (0, 0, 255)).all()
    assert (image[64:, 32:96] == 255).all()


def test_svg_half_opacity_and_offset():
    body = '<path fill="#000" fill-opacity=".5" d="M10 10h4v4h-4z"/>'
    image = rasters.from_svg(body, (10, 10, 4, 4), 16)
    assert np.abs(image.astype(int) - 127).max() <= 1


def test_svg_own_references_are_allowed():
    body = '<linearGradient id="g"><stop stop-color="#f00"/></linearGradient>'
    image = rasters.from_svg(body + '<path fill="url(#g)" d="M0 0h8v8H0z"/>', (0, 0, 8, 8), 8)
    assert (image == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "body",
    [
        '<image href="/a.png"/>',
        '<use xlink:href="file.svg#a"/>',
        '<path fill="url(http://a/b)" d="M0 0h8v8H0z"/>',
        "<style>@import 'a.css'</style>",
    ],
)
def test_svg_outside_references_are_refused(body):
    with pytest.raises(ValueError, match="outside itself"):
        rasters.from_svg(body, (0, 0, 8, 8))


@pytest.mark.parametrize("count", [50, 500])
def test_composition_split_guarantee(count):
    styles_of = many_styles(count)
    held = splits.composition_pairs(styles_of)
    total = sum(map(len, styles_of.values()))
    assert len(held) == round(0.05 * total)
    assert len({hexcode for hexcode, _ in held}) == len(held)  # one style per object
    train = {(h, s) for h, styles in styles_of.items() for s in styles} - held
    for hexcode, style in held:
        assert style in styles_of[hexcode] and len(styles_of[hexcode]) >= 3
        assert any(h == hexcode for h, _ in train) and any(s == style for _, s in train)


def test_heldout_is_balanced_and_apart():
    styles_of = many_styles(500)
    held = splits.heldout_pairs(styles_of, tarballs.STYLES)
    reduced = {hexcode for hexcode, _ in splits.composition_pairs(styles_of)}
    per_style = collections.Counter(style for _, style in held)
    assert set(per_style) == set(tarballs.STYLES) and len(set(per_style.values())) == 1
    assert len({hexcode for hexcode, _ in held}) == len(held) >= 90
    assert all(len(styles_of[h]) == 4 and h not in reduced for h, _ in held)


def test_splits_do_not_depend_on_order_or_process():
    styles_of = many_styles(60)
    backwards = {h: tuple(reversed(s)) for h, s in reversed(styles_of.items())}
    here = splits.composition_pairs(styles_of)
    assert splits.composition_pairs(backwards) == here
    assert splits.heldout_pairs(backwards, tarballs.STYLES) == splits.heldout_pairs(
        styles_of, tarballs.STYLES
    )
    # Fixed for ever: the committed prompts and weights rest on these values.
    assert splits.rank("composition", "1f34e") == 10816460680294337922
    assert splits.rank("heldout", "1f34e") == 6496156238051599396


def test_captions_name_object_and_style():
    made = {style: captions.captions("red apple", style) for style in tarballs.STYLES}
    assert made["fluent-3d"][0] == "a 3D render of a red apple"
    assert len({text for texts in made.values() for text in texts}) == 12
    for style, texts in made.items():
        assert all("red apple" in t and captions.STYLE_WORDS[style] in t for t in texts)
    with pytest.raises(KeyError):
        captions.captions("red apple", "oil")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("one o’clock", "a one o'clock"),
        ("SOS button", "an SOS button"),
        ("UP! button", "an UP! button"),
        ("OK hand", "an OK hand"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("busts in silhouette", "busts in silhouette"),
        ("face with tears", "a face with tears"),
        ("flag: Austria", "flag: Austria"),
        ("Japanese “here” button", 'a Japanese "here" button'),
    ],
)
def test_articles_and_quotes(label, expected):
    assert captions.captions(label, "noto")[0] == f"a Noto emoji of {expected}"


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
