import pytest

from benchmarks import topologies


def test_the_table_is_written_between_its_marks(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- topologies -->\nold\n<!-- /topologies -->\nafter\n")
    topologies.main(
        ["--config", "emoji:smoke", "--topologies", "h100:1", "h200:2", "--store", "",
         "--price", "h100=3", "--write", str(page)]
    )  # fmt: skip
    table = capsys.readouterr().out.strip()
    assert page.read_text() == (
        f"before\n<!-- topologies -->\n{table}\n<!-- /topologies -->\nafter\n"
    )
    heads, rule, first, second = table.splitlines()
    assert heads.endswith("| chip-hours | cost |") and set(rule) <= set("|- ")
    assert first.startswith("| `h100:1` |") and " of 75 | yes |" in first
    assert second.endswith("|  |")  # a price that nobody gave


def test_a_file_without_marks_is_told(tmp_path):
    (tmp_path / "a.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no marks"):
        topologies.write(tmp_path / "a.md", "x")
