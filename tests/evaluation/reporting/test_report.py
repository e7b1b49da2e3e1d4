"""What a report says, that nothing in it can become markup, and that it asks for nothing."""

import base64
import dataclasses
import functools
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from tlcm_jax.evaluation.reporting import report
from tlcm_jax.evaluation.reporting.contents import (
    Curve,
    ImageGrid,
    ImageRow,
    Report,
    ScoreColumn,
    ScoreRow,
)

HOSTILE = """<script>alert('p0wned')</script>"&'</td><img src=//evil.example/x.png onerror=go()>"""


def pixels(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def full_report(text: str = "a red fox") -> Report:
    """A report with every part, and `text` in every place that takes text."""
    grid = ImageGrid(
        text,
        [text, "second prompt"],
        [
            ImageRow(text, pixels(2, seed=1)),
            ImageRow("4 steps", pixels(2, size=100, seed=2)),
            ImageRow("25 steps", pixels(2, seed=3), "teacher"),
        ],
        text,
    )
    return Report(
        title=text,
        summary=text,
        highlights={text: text},
        grids=[grid],
        scores=[
            ScoreRow(text, {"object_top1": 0.72, "frechet_distance": 3.3}),
            ScoreRow("teacher, 4 steps", {"object_top1": float("nan")}, "teacher"),
            ScoreRow("teacher, 25 steps", {"object_top1": 0.8, "frechet_distance": 3.0}, "teacher"),
            ScoreRow("real pictures", {"object_top1": 0.95}, "real"),
        ],
        columns=[
            ScoreColumn("object_top1", "object top-1", percent=True),
            ScoreColumn("object_top5", "object top-5", percent=True),
            ScoreColumn("frechet_distance", "Fréchet", higher_is_better=False),
        ],
        reference="teacher, 25 steps",
        curves=[
            Curve(text, text, [1, 2, 3], [0.3, float("nan"), 0.1], unit=text, log=True),
            Curve(text, "throughput", [1, 2, 3], [10.0, 12.0, 11.0]),
            Curve("second stage", "loss", [1, 2, 3], [0.3, 0.2, 0.1]),
        ],
        config={text: text, "stages": {"first": {"learning_rate": 1e-4, "steps": [1, 2]}}},
        provenance={text: text},
    )


@functools.cache
def tame_page() -> str:
    return report.render(full_report())


@functools.cache
def hostile_page() -> str:
    return report.render(full_report(HOSTILE))


class Elements(html.parser.HTMLParser):
    """Collects (tag, attributes) of a page, and the text of its cells by row."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        if tag == "small":
            self.rows[-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data.strip()


def test_pictures_come_back_exactly():
    images = [attributes for tag, attributes in Elements(tame_page()).elements if tag == "img"]
    assert len(images) == 6
    grid = full_report().grids[0]
    # Row by prompt, column by sampler.
    expected = [(i, row) for i in range(2) for row in grid.rows]
    for attributes, (index, row) in zip(images, expected, strict=True):
        kind, data = attributes["src"].split(";base64,")
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert attributes["alt"] == f"{row.label}: {grid.prompts[index]}"
        if row.images.shape[1] == 32:
            assert kind == "data:image/png" and attributes["width"] == "96"
            np.testing.assert_array_equal(decoded, row.images[index])
        else:
            assert kind == "data:image/webp" and attributes["width"] == "128"
            assert decoded.shape == (100, 100, 3)


def test_large_pictures_are_reduced():
    uri = report.data_uri(pixels(1, size=1024)[0])
    size = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).size
    assert size == (384, 384)


def test_score_table():
    rows = Elements(tame_page()).rows
    table = rows[rows.index(next(row for row in rows if "object top-1" in row)) :]
    # Columns without any score are left out, and so are comparisons with nothing.
    assert table[0] == ["", "object top-1", "Fréchet↓"]
    assert table[1] == ["a red fox", "72.0 % | 90 %", "3.30 | 1.10 ×"]
    assert table[2] == ["teacher, 4 steps", "–", "–"]
    assert table[3] == ["teacher, 25 steps", "80.0 %", "3.00"]
    assert table[4] == ["real pictures", "95.0 %", "–"]


def test_config_and_provenance_are_listed():
    rows = Elements(tame_page()).rows
    assert ["stages.first.learning_rate", "0.0001"] in rows
    assert ["stages.first.steps", "[1, 2]"] in rows
    assert ["a red fox", "a red fox"] in rows  # provenance


def test_one_drawing_for_each_curve_grouped_by_stage():
    page = tame_page()
    assert page.count("<svg") == 3
    assert [m for m in re.findall(r"<h3>(.*?)</h3>", page)] == ["a red fox", "second stage"]
    # Colours are the page's own, so that the drawing follows the light and the dark theme.
    assert "var(--line)" in page and not re.search(r"#0[1-9a]0[2-9b]0[3-9c]\b", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_hostile_text_never_becomes_markup():
    tame, hostile = (Elements(page) for page in (tame_page(), hostile_page()))
    skeleton = [[(tag, sorted(a)) for tag, a in page.elements] for page in (tame, hostile)]
    assert skeleton[0] == skeleton[1]
    assert any(HOSTILE == cell for row in hostile.rows for cell in row)


@pytest.mark.parametrize("render", [tame_page, hostile_page])
def test_page_refers_to_nothing_outside(render):
    page = Elements(render())
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_report_without_scores_or_anything_else():
    page = report.render(Report(title="mine"))
    assert "<h1>mine</h1>" in page
    for absent in ("<table", "<figure", "<details", "<section"):
        assert absent not in page


def test_scores_without_a_reference_are_not_compared():
    plain = dataclasses.replace(full_report(), reference=None)
    page = report.render(plain)
    assert "<small>" not in page and "relative to the row" not in page


def test_write_report(tmp_path):
    report.write_report(tmp_path / "report.html", full_report("naïve 狐狸"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "naïve 狐狸" in page


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ImageRow("4 steps", np.zeros((2, 8, 8, 3), np.float32)), "uint8 [n, h, w, 3]"),
        (lambda: ImageRow("4 steps", np.zeros((8, 8, 3), np.uint8)), "'4 steps' must be"),
        (
            lambda: ImageGrid("fox", ["a", "b"], [ImageRow("4 steps", pixels(3))]),
            "2 prompts, but row '4 steps' has 3 images",
        ),
        (lambda: ImageGrid("fox", ["a"], []), "at least one prompt"),
        (lambda: ImageGrid("fox", [], [ImageRow("4 steps", pixels(0))]), "at least one prompt"),
        (lambda: Curve("stage 1", "loss", [1, 2], [0.5]), "2 steps and 1 values"),
        (
            lambda: Report(title="x", scores=[ScoreRow("a", {})], reference="b"),
            "'b' is no row of the scores: choose one of ['a']",
        ),
    ],
)
def test_mistakes_are_named(build, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        build()
