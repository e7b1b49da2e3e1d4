"""The whole command with small random-weight scorers, from their files to the report."""

import json
import re

import numpy as np
import pytest
from absl import flags

from configs import sdxl
from tests.support.scorer_files import write_clip, write_scorers
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import evaluate as command
from tlcm_jax import paths
from tlcm_jax.config.schema import read
from tlcm_jax.evaluation.protocols import PROTOCOLS, load_protocol
from tlcm_jax.evaluation.scorers import feature_distance
from tlcm_jax.evaluation.scorers.table import SCORERS, load_scorer


def run_command(*arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["evaluate", *map(str, arguments)])
    command.run(values)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "few.txt").write_text("a red cat\nan icon\nred\n")
    model = write_tiny_pipeline(folder / "tiny")
    return folder, (f"--model={model}", f"--prompts={folder / 'few.txt'}", "--steps=1,2")


def test_every_score_is_told(given, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_distance, "_BATCH", 4)
    folder, arguments = given
    scores = write_scorers(folder / "scorers")
    told = ",".join(f"{name}={path}" for name, path in scores.items())
    run_command(*arguments, f"--scores={told}", f"--output={tmp_path}")
    student = json.loads((tmp_path / "metrics.json").read_text())["sets"]["few"]["student"]
    assert list(student) == ["1", "2"]
    assert student["1"].keys() >= scores.keys()
    assert abs(student["1"]["clip"]) <= 100
    intervals = student["1"].pop("intervals")
    assert intervals.keys() == {"aesthetic", "clip", "hps_v21", "image_reward", "mps", "pickscore"}
    assert all(low <= student["1"][key] <= high for key, (low, high) in intervals.items())
    assert all(np.isfinite(value) for value in student["1"].values())
    assert all(student["1"][name] != student["2"][name] for name in scores)
    assert "clip score" in (tmp_path / "report.html").read_text()


def test_a_protocol_takes_the_scores_that_have_weights(given, tmp_path, caplog):
    folder, arguments = given
    write_clip(folder / "some" / "clip")
    given = [each for each in arguments if not each.startswith("--steps")]
    with pytest.raises(ValueError, match="--protocol needs --scorers"):
        run_command(*given, "--protocol=dmd2", f"--output={tmp_path}")
    with pytest.raises(FileNotFoundError, match="holds the weights of no score; fid_512 "):
        run_command(
            *given, "--protocol=dmd2", f"--scorers={folder / 'nowhere'}", f"--output={tmp_path}"
        )
    run_command(*given, "--protocol=dmd2", f"--scorers={folder / 'some'}", f"--output={tmp_path}")
    student = json.loads((tmp_path / "metrics.json").read_text())["sets"]["few"]["student"]
    assert student.keys() == {"4"} and student["4"].keys() == {
        "clip",
        "intervals",
    }  # absent, and never 0
    report = (tmp_path / "report.html").read_text()
    assert "HPSv3" in report and "&#39;mps&#39; are missing" in report


def test_every_protocol_s_scores_are_there():
    # COCO-2017's 5 000, MJHQ's 30 000 and COCO-2014's 10 000: what the tables say of themselves.
    counts = {"tlcm": 5000, "logcd": 5000, "mjhq": 30000, "dmd2": 10000}
    assert {name: protocol.count for name, protocol in PROTOCOLS.items()} == counts
    for protocol in PROTOCOLS.values():
        assert set(protocol.scores) <= SCORERS.keys()
    with pytest.raises(ValueError, match="protocol 'lcm' is not one of tlcm, logcd, mjhq, dmd2"):
        load_protocol("lcm", "")


def test_missing_weights_are_told_before_the_model_is_loaded(given, tmp_path, monkeypatch):
    folder, arguments = given
    monkeypatch.setattr(command, "load_model", None)
    with pytest.raises(FileNotFoundError, match=r"'clip' are missing \(none in .*nowhere"):
        run_command(*arguments, f"--scores=clip={folder / 'nowhere'}", f"--output={tmp_path}")


@pytest.mark.parametrize("name", SCORERS)
def test_every_score_says_where_its_weights_come_from(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"of score '{name}' are missing .*fetch .* from "):
        load_scorer(name, str(tmp_path))


def test_the_full_size_recipe_names_scorers_that_there_are():
    stages = read(sdxl.get_config("full").to_dict()).stages
    preference = stages["preference"].terms["preference"]
    named = {*preference.scorers, preference.held_out}
    assert named == {"mps", "image_reward"} <= SCORERS.keys()
    assert all("latent_lpips" in stage.terms for stage in stages.values())
    assert {"distribution_matching", "adversarial"} <= stages["matching"].terms.keys()


def test_the_table_of_files_is_the_registry_s(tmp_path):
    """Each scorer that there is, and no other, with the origin that its loader names."""
    text = (paths.ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    told = {name: row for row in cells for name in re.findall(r"`(\w+)`", row[0])}
    assert told.keys() == SCORERS.keys()
    for name, (_, origin, beside, size, licence) in told.items():
        with pytest.raises(FileNotFoundError) as error:
            load_scorer(name, str(tmp_path))
        file, source = re.search(r"fetch (\S+) .*?from (.+) and put", str(error.value)).groups()
        assert source.removeprefix("the releases of ").partition(" (")[0] in origin, name
        assert file.endswith(".safetensors") or f"`{file}.p" in origin, name
        assert re.search(r"\d [GMk]B", size) and licence and beside, name
    # Where the full-size recipe looks, and the term that is not a score.
    stages = sdxl.get_config("full")["stages"]
    folders = {stages["preference"]["terms"]["preference"]["scorers"]["mps"]["weights"],
               stages["preference"]["terms"]["preference"]["held_out_weights"],
               stages["matching"]["terms"]["latent_lpips"]["weights"]}  # fmt: skip
    assert all(f"`{folder}`" in text for folder in folders)
