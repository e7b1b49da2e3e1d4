"""The report in a real browser: headless Chromium draws it whole and complains of nothing."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tlcm_jax.evaluation.reporting import report
from tlcm_jax.evaluation.reporting.contents import (
    Curve,
    ImageGrid,
    ImageRow,
    Report,
    ScoreRow,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on PATH (Debian: apt-get install chromium)"
)
RED = np.array([230, 30, 40], np.uint8)

# Runs in a copy of the page, whose policy is opened for it alone. All at once in the load event:
# Chromium writes the page out after it, and waits for nothing else. (That the pixels are right
# is for the screenshot to show.)
PROBE = """<script nonce="probe">
const problems = [];
addEventListener("error", e => problems.push("error " + (e.message || e.target.src)), true);
addEventListener("securitypolicyviolation", e => problems.push("policy " + e.violatedDirective));
addEventListener("load", () => {
  const images = [...document.images];
  document.documentElement.dataset.probe = JSON.stringify({
    problems,
    widths: images.map(i => i.naturalWidth),
    shown: images.map(i => i.clientWidth),
    requests: performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
    drawings: [...document.querySelectorAll("svg")].map(s => s.getBBox().width),
    overflow: document.documentElement.scrollWidth - innerWidth,
  });
});
</script>"""


def browse(tmp_path, page: str, *options: str) -> tuple[str, list[str]]:
    """Opens a page; returns what Chromium printed and what its console said."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/home"),
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE[^\n]*", done.stderr)


@pytest.fixture(scope="module")
def page() -> str:
    red = np.broadcast_to(RED, (2, 32, 32, 3)).copy()
    large = np.broadcast_to(RED, (2, 100, 100, 3)).copy()
    rows = [ImageRow(f"{n} steps", red) for n in (1, 2, 3, 4, 8)]
    rows += [ImageRow("4 steps", large, "teacher"), ImageRow("25 steps", red, "teacher")]
    return report.render(
        Report(
            title="A report",
            grids=[ImageGrid("Pictures", ["a <b>fox", "word" * 60], rows)],
            scores=[
                ScoreRow("student, 4 steps", {"object_top1": 0.7, "frechet_distance": 3.0}),
                ScoreRow("teacher", {"object_top1": 0.8, "frechet_distance": 2.0}, "teacher"),
            ],
            reference="teacher",
            curves=[Curve("stage", name, range(50), range(1, 51)) for name in ("loss", "speed")],
            config={"seed": 0},
            provenance={"jax": "1"},
        )
    )


def test_console_would_be_heard(tmp_path):
    _, console = browse(tmp_path, "<script>console.error('heard')</script>", "--dump-dom")
    assert any("heard" in line for line in console)


def test_every_picture_decodes_and_nothing_is_requested(tmp_path, page):
    opened = page.replace("default-src 'none';", "default-src 'none'; script-src 'nonce-probe';")
    assert opened != page
    dom, console = browse(tmp_path, opened.replace("<style>", PROBE + "<style>", 1), "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, "the probe did not finish"
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["problems"] == [] and console == [] and seen["requests"] == []
    assert seen["widths"] == [32, 32, 32, 32, 32, 100, 32] * 2
    assert seen["shown"] == [96, 96, 96, 96, 96, 128, 96] * 2
    assert len(seen["drawings"]) == 2 and min(seen["drawings"]) > 100
    assert seen["overflow"] <= 0  # wide tables scroll in their own frame, not the page


@pytest.mark.parametrize(("theme", "dark"), [("1", False), ("0", True)])
def test_screenshot_in_both_themes(tmp_path, page, theme, dark):
    shot = tmp_path / "shot.png"
    _, console = browse(
        tmp_path,
        page,
        f"--screenshot={shot}",
        "--window-size=1200,1800",
        f"--blink-settings=preferredColorScheme={theme}",
    )
    assert console == []
    image = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert image.shape == (1800, 1200, 3)
    assert (image[5, 5].mean() < 60) == dark
    red = (abs(image - RED.astype(int)).max(-1) <= 6).sum()
    expected = 2 * (6 * 96**2 + 128**2)  # less the rounded corners
    assert 0.98 * expected < red <= expected
