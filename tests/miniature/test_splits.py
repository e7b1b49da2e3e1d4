"""Which pairs of object and style are held out, and the captions of the rest."""

import collections

import pytest

from miniature import captions, splits, tarballs


def many_styles(count):
    """An index of `count` objects, of which every fifth has two styles only."""
    return {
        f"{0x1F300 + i:x}": tarballs.STYLES[:2] if i % 5 == 0 else tarballs.STYLES
        for i in range(count)
    }


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
