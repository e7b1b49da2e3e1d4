"""The blind page: nobody can tell whose image is whose, and the votes are summed as they were cast.

In headless Chromium, where it is installed: keys are pressed and the sum is read from the page.
"""

import json
import re

import numpy as np
import pytest

from tests.evaluation.reporting.test_browser import CHROMIUM, browse
from tlcm_jax.evaluation.reporting.blind import wilson, write_blind_page
from tlcm_jax.evaluation.reporting.contents import ImageGrid, ImageRow, Report

EVIL = "</script><script>document.title='owned'</script><b>a & \"cat\""
PROMPTS = [EVIL, *(f"prompt {i}" for i in range(11))]


@pytest.fixture(scope="module")
def report() -> Report:
    def flat(value: int) -> np.ndarray:
        return np.full((len(PROMPTS), 16, 16, 3), value, np.uint8)

    rows = [ImageRow("4 steps", flat(20)), ImageRow("25 steps", flat(200), "teacher")]
    return Report(title="Tiny", grids=[ImageGrid(title="few", prompts=PROMPTS, rows=rows)])


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_order_and_sides_are_random_and_the_same_for_a_seed(report, tmp_path):
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_blind_page(tmp_path / name, report, seed=seed)
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1] != pages[2]
    items = data_of(pages[0])["items"]
    assert sorted(item["prompt"] for item in items) == sorted(PROMPTS)
    assert [item["prompt"] for item in items] != PROMPTS
    assert 2 <= sum(item["coin"] for item in items) <= 10
    assert all(len(set(item["images"])) == 2 for item in items)
    assert data_of(pages[0])["names"] == ["student, 4 steps", "teacher, 25 steps"]


def test_nothing_in_a_prompt_ends_the_script(report, tmp_path):
    write_blind_page(tmp_path / "page", report)
    page = (tmp_path / "page").read_text()
    assert EVIL not in page and page.count("</script>") == 2
    assert EVIL in [item["prompt"] for item in data_of(page)["items"]]


def test_one_column_is_no_pair(tmp_path):
    grid = ImageGrid(
        title="few", prompts=["a"], rows=[ImageRow("1 step", np.zeros((1, 8, 8, 3), np.uint8))]
    )
    with pytest.raises(ValueError, match="needs images of two"):
        write_blind_page(tmp_path / "page", Report(title="One", grids=[grid]))


def test_the_interval_is_wilson_s():
    """Agresti & Coull 1998's table, and its ends."""
    np.testing.assert_allclose(wilson(8, 10), (0.4902, 0.9433), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 10), (0, 0.2775), atol=5e-5)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_votes_are_summed_for_those_they_were_cast_for(report, tmp_path):
    write_blind_page(tmp_path / "blind", report)
    page = (tmp_path / "blind").read_text()
    items = data_of(page)["items"]
    # The student's image wins nine times, wherever it is; then one goes back and says neither.
    keys = ["ArrowLeft" if item["coin"] else "ArrowRight" for item in items[:9]]
    keys += ["ArrowUp", "ArrowDown"]
    press = "".join(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}));"
                    for key in keys)  # fmt: skip
    place = "document.body.dataset.place = document.getElementById('place').textContent;"
    press += place + "document.getElementById('end').click();"
    (tmp_path / "browser").mkdir()
    shown, complaints = browse(
        tmp_path / "browser",
        page.replace("</body>", f"<script>{press}</script></body>"),
        "--dump-dom",
    )
    assert not complaints
    assert 'data-place="10 of 12"' in shown
    cells = re.findall(r"<td>(.*?)</td>", shown)
    low, high = wilson(8, 8)
    interval = f"{100 * low:.1f} % to {100 * high:.1f} %"
    assert cells[:4] == ["student, 4 steps", "8", "100.0 %", interval]
    assert cells[4:7] == ["teacher, 25 steps", "0", "0.0 %"]
    assert cells[8:10] == ["neither", "1"]
    assert "owned" not in re.search(r"<title>(.*?)</title>", shown)[1]
