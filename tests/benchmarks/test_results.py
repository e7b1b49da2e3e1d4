"""The page of results: equal budgets, runs that resume and fail, and tables of several seeds."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from benchmarks.results import __main__ as command
from benchmarks.results import budget, measure, numbers, prose, queue, runs
from benchmarks.results.experiment import Experiment, NotHere, Table, missing_files
from benchmarks.results.job import accounts
from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax.config.build import load_losses, nfe_per_pair
from tlcm_jax.config.schema import read
from tlcm_jax.data.prompt_sets import PromptSet
from tlcm_jax.evaluation.scorers.base import Measure
from tlcm_jax.families.load import load_model

EXPERIMENTS = {e.name: e for table in command.TABLES for e in table.experiments}


def there(experiment):
    try:
        experiment.config()
    except NotHere:
        return False
    return True


@pytest.mark.parametrize("name", [n for n, e in EXPERIMENTS.items() if there(e)])
def test_every_experiment_uses_the_same_evaluations(name):
    whole = budget.WHOLE
    for share in (1.0, 0.3):
        settings = read(runs.sized(EXPERIMENTS[name], share * whole))
        found = budget.costs(settings)
        assert list(found) == list(settings.stages)
        finest = min(cost.step for cost in found.values())
        assert abs(budget.total(settings) - share * whole) <= finest / 2
        for stage in settings.stages.values():
            assert 10 * stage.warmup_steps <= stage.steps


def test_the_whole_budget_is_the_default_recipe_s():
    assert budget.total(read(EXPERIMENTS["default"].config())) == pytest.approx(
        budget.WHOLE, rel=5e-3
    )


class Redness:
    """A picture's first value is whether it is right."""

    measures = (Measure(key="right", title="right", percent=True),)

    def values(self, images, prompts, annotations):
        assert len(images) == len(prompts)
        return {"right": images[:, 0, 0, 0] / 255}

    def summarise(self, values):
        return {"right": float(values["right"].mean())}


def test_the_first_measure_is_told_by_task_too():
    images = np.zeros((4, 1, 1, 3), np.uint8)
    images[[0, 3]] = 255
    tasks = ["size", "single object", "single object", "single object"]
    prompts = PromptSet(name="t", prompts=tuple("abcd"), annotations={"task": tasks})
    found = measure.scored(images, prompts, [Redness()])
    assert found == {"right": 0.5, "size": 1.0, "single_object": pytest.approx(1 / 3)}
    plain = PromptSet(name="t", prompts=tuple("abcd"))
    assert measure.scored(images, plain, [Redness()]) == {"right": 0.5}
    assert measure.scored(images, plain, []) == {}


def test_names_fit_over_a_column_and_mean_one_thing():
    assert all(len(name) <= 12 for name in EXPERIMENTS)
    listed = [e for table in command.TABLES for e in table.experiments]
    assert all(EXPERIMENTS[e.name] == e for e in listed)


def test_costs_are_those_that_the_stages_count(tmp_path):
    """As a run on other weights counts them."""
    model = load_model(write_tiny_pipeline(tmp_path))
    settings = read(EXPERIMENTS["dmd2"].config())
    loss = load_losses(settings, model)["matching"]
    assert set(loss.terms) == {"distribution_matching", "adversarial"}
    cost = budget.costs(settings)["matching"]
    assert cost.forwards == nfe_per_pair(loss, 1) == loss.nfe_per_pair.total
    assert cost.backwards == loss.nfe_per_pair.student == 1
    assert cost.pairs == 32 and cost.step == 32 * cost.forwards


def test_steps_follow_the_shares():
    config = EXPERIMENTS["paper"].config()
    found = budget.costs(read(config))
    segments, endpoints = found["segments"].step, found["endpoints"].step
    whole = 100 * segments + 200 * endpoints
    parts = {"segments": 100 * segments, "endpoints": 200 * endpoints}
    result = budget.scaled(config, whole, parts)
    assert [result["stages"][n]["steps"] for n in ("segments", "endpoints")] == [100, 200]
    assert config["stages"]["segments"]["steps"] == 900  # as it was
    least = budget.scaled(config, 1.0, {"segments": 1, "endpoints": 1})
    assert [stage["steps"] for stage in least["stages"].values()] == [1, 1]
    with pytest.raises(ValueError, match="give a positive one"):
        budget.scaled(config, whole, {"segments": 1.0})


def test_an_experiment_of_another_version_has_no_row(tmp_path):
    known = EXPERIMENTS["default"]
    table = Table(
        name="t",
        title="T",
        says="",
        experiments=(
            known,
            Experiment(name="later", says="", recipe="shapes_of_the_future"),
            Experiment(name="ema", says="", recipe="shapes", changes={"emma_decay": 0.9}),
        ),
    )
    planned = runs.plan([table], tmp_path, (0, 1))
    assert set(planned.absent) == {"later", "ema"} and "emma_decay" in planned.absent["ema"]
    assert [run.seed for run in planned.runs["default"]] == [0, 1]
    other = runs.plan([table], tmp_path, (0, 1), share=0.5)
    assert {r.folder for r in planned.runs["default"]}.isdisjoint(
        {r.folder for r in other.runs["default"]}
    )
    # What is asked at the end is no part of what a run learns.
    limited = runs.plan([table], tmp_path, (0,), limit=16)
    assert limited.runs["default"][0].folder == planned.runs["default"][0].folder
    clash = dataclasses.replace(known, says="another")
    with pytest.raises(ValueError, match="two experiments are called 'default'"):
        runs.plan([table, dataclasses.replace(table, experiments=(clash,))], tmp_path, (0,))
    with pytest.raises(ValueError, match="--only nothing: give of t, default"):
        command.selected([table], planned, ["nothing"])
    assert [r.seed for r in command.selected([table], planned, ["t"])] == [0, 1]
    # The seeds of one row draw from noise of their own, and all rows of a seed from the same.
    noises = [run.asked.noise for run in planned.runs["default"]]
    assert len(set(noises)) == 2
    assert [run.asked.noise for run in planned.teachers.values()] == noises


def test_weights_that_are_missing_are_named(tmp_path):
    config = EXPERIMENTS["lpips"].config()
    config["stages"]["segments"]["terms"] = {"latent_lpips": {"weights": str(tmp_path / "no")}}
    assert "shapes.train_latent_lpips` makes them" in missing_files(read(config))
    config["stages"]["segments"]["terms"]["latent_lpips"]["weights"] = str(tmp_path)
    assert missing_files(read(config)) == ""


PERCENT, PLAIN = Measure(key="a", title="a", percent=True), Measure(key="b", title="b")


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ([0.44, 0.46, 0.45], PERCENT, "45.0 ± 1.0"),
        ([0.44], PERCENT, "44.0"),
        ([70.0, 74.0], PLAIN, "72.0 ± 2.8"),
        ([0.2, 0.21, None], PLAIN, "0.205 ± 0.007"),
        ([None, float("nan")], PLAIN, "–"),
        ([], PERCENT, "–"),
    ],
)
def test_numbers_of_seeds_are_mean_and_spread(values, kind, text):
    assert numbers.number(values, kind) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.05, 0.06, 0.04], "**+5.0 ± 0.6**"),
        ([-0.05, 0.03], "-1.0 ± 4.0"),
        ([-0.1, -0.1, None], "**-10.0 ± 0.0**"),
        ([0.05], "–"),
    ],
)
def test_differences_have_a_standard_error(values, text):
    assert numbers.difference(values, PERCENT) == text


def fake(folder, name="default", seed=0, top1=0.4, steps=(4,)):
    """A finished run with made-up scores."""
    asked = runs.Asked(
        prompts="few.txt",
        scorers=(),
        guidance_scale=2.0,
        gamma=1.0,
        steps=steps,
        noise=seed,
    )
    run = runs.Run(name=name, seed=seed, config={}, asked=asked, folder=folder / f"{name}{seed}")
    scores = {
        str(n): {"all_checks": top1, "open_attributes": 0.25, "size": top1 / 2} for n in steps
    }
    kinds = {"student": scores}
    if name == runs.TEACHER:
        kinds["teacher"] = {"25": {"all_checks": 0.5}, "4": {"all_checks": 0.3}}
    told = {
        "asked": run.job["asked"],
        "seed": seed,
        "scores": kinds,
        "real": {"all_checks": 0.9},
        "prompts": 400,
        "unseen": 200,
        "shown": ["a red cat"] * 2,
        "forwards": 2000.0,
        "backwards": 500.0,
        "training_seconds": 60.0,
        "seconds": {"drawing": 30.0},
        "provenance": {"host": "a computer", "devices": "one", "versions": "jax 0"},
    }
    run.folder.mkdir(parents=True)
    (run.folder / runs.SCORES).write_text(json.dumps(told))
    grey = {f"student-{n}": np.full((2, 64, 64, 3), 99, np.uint8) for n in steps}
    grey |= {f"teacher-{n}": np.full((2, 64, 64, 3), 9, np.uint8) for n in (25, 4)}
    np.savez(run.folder / runs.PICTURES, **grey)
    return run


def planned(teachers, found, **missing):
    return runs.Plan(
        evaluations=2000.0,
        seeds=tuple(run.seed for run in teachers),
        teachers={run.seed: run for run in teachers},
        runs=found,
        waiting=missing,
        absent={},
    )


def test_the_page_shows_means_reasons_and_commentary(tmp_path):
    steps = (1, 4)
    teachers = [fake(tmp_path, runs.TEACHER, seed, 0.4 + seed / 10, steps) for seed in (0, 1)]
    rows = {
        "default": (fake(tmp_path, steps=steps), fake(tmp_path, seed=1, top1=0.5, steps=steps)),
        "jumps_x0": (fake(tmp_path, "jumps_x0", steps=steps),),
    }
    broken = dataclasses.replace(
        rows["jumps_x0"][0], seed=1, folder=tmp_path / "broken", name="jumps_x0"
    )
    broken.folder.mkdir()
    (broken.folder / runs.FAILURE).write_text(json.dumps({"message": "the loss is not finite"}))
    rows["jumps_x0"] += (broken,)
    table = Table(
        name="small",
        title="Small",
        says="Two rows.",
        steps=steps,
        experiments=tuple(EXPERIMENTS[n] for n in ("default", "jumps_x0", "jumps4", "full")),
    )
    followed = dataclasses.replace(table, name="few", title="Few", followed=("open_attributes",))
    empty = dataclasses.replace(table, name="empty", title="Empty", experiments=())
    output = tmp_path / "docs" / "results.md"
    (output.parent / "results").mkdir(parents=True)
    (output.parent / "results" / "commentary.md").write_text("What I *think*.\n")
    plan = planned(teachers, rows, full="the weights are missing")
    words = ["python", "-m", "benchmarks.results", "--seeds", "0,1"]
    command.write([table, followed, empty], plan, output, words)
    text = output.read_text(encoding="utf-8")
    assert "python -m benchmarks.results --seeds 0,1" in text and "What I *think*." in text
    assert "over 2 seeds (0, 1)" in text and "2,000 UNet forwards" in text
    says = EXPERIMENTS["default"].says
    assert f"| `default` {says} | 45.0 ± 7.1 | 0.250 ± 0.000 | 2.0 | 0.5 | 1.0 |" in text
    assert "(1 of 2 seeds) | 40.0 | 0.250 |" in text
    assert "| teacher, 25 steps with guidance | 50.0 ± 0.0 | – | – | – | – |" in text
    assert "| teacher, 4 steps with guidance | 30.0 ± 0.0 |" in text
    assert "| undistilled, in the student's sampler, 4 steps | 45.0 ± 7.1 | 0.250 ± 0.000" in text
    assert "| real pictures | 90.0 |" in text
    assert "less `default`" not in text
    assert "### Small: by task, 4 steps" in text and "| `default` | 22.5 ± 3.5 |" in text
    assert "on 200 prompts of shapes in colours that the teacher never saw" in text
    assert (
        "| steps | 1 | 4 | 25 |" in text
        and "| teacher with guidance | – | 30.0 ± 0.0 | 50.0 ± 0.0 |" in text
    )
    assert "### Small: all checks, %" in text and "### Few: open attributes, TV" in text
    assert "### Few: all checks" not in text
    assert "- `jumps_x0, seed 1` failed: the loss is not finite" in text
    assert "- `full` was not run: the weights are missing." in text
    assert "- Not run: `jumps4`." in text and "Empty" not in text
    assert "3 runs, 4 min 30 s of work in all" in text
    sheet = output.parent / "results" / "small-4.png"
    assert "](results/small-4.png)" in text and 0 < sheet.stat().st_size < 300_000

    alone = planned(teachers[:1], {name: found[:1] for name, found in rows.items()})
    command.write([table], alone, output, words)
    assert "One seed (0), so no spread is known" in output.read_text(encoding="utf-8")

    lower = (fake(tmp_path, "jumps2", 0, 0.3, steps), fake(tmp_path, "jumps2", 1, 0.4, steps))
    both = planned(teachers, {"default": rows["default"], "jumps2": lower})
    pair = tuple(EXPERIMENTS[n] for n in ("default", "jumps2"))
    held = dataclasses.replace(table, experiments=pair, against="default")
    command.write([held], both, output, words)
    text = output.read_text(encoding="utf-8")
    assert "### Small: each row less `default`" in text
    assert "| `jumps2` | **-10.0 ± 0.0** | **-10.0 ± 0.0** |" in text
    assert prose.figures(text.split("\n"))["jumps2.checks.4"] == "35.0"


def test_done_runs_are_skipped_and_failed_ones_recorded(tmp_path, monkeypatch):
    teacher, done = fake(tmp_path, runs.TEACHER), fake(tmp_path)
    good = dataclasses.replace(done, seed=1, folder=tmp_path / "good")
    bad = dataclasses.replace(done, seed=2, folder=tmp_path / "bad")
    killed = dataclasses.replace(done, seed=3, folder=tmp_path / "killed")
    scores = (done.folder / runs.SCORES).read_text()
    program = (
        "import os, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "if folder.name == 'bad': sys.exit('error: no such thing')\n"
        "if folder.name == 'killed': os.kill(os.getpid(), 9)\n"
        f"(folder / 'scores.json').write_text({scores!r})\n"
    )
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{program}")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(queue.sys, "executable", str(tmp_path / "python"))
    lines = []
    teachers = {run.seed: teacher for run in (done, good, bad, killed)}
    failed = queue.perform(teachers, [done, good, bad, killed], lines.append)
    assert failed == [bad, killed]
    assert lines[0] == "1 of 4 runs are done"
    assert lines[1].startswith("[1/3] default, seed 1: all_checks 0.400")
    assert "[2/3] default, seed 2: failed: no such thing" in lines[2]
    assert bad.failure() == "no such thing" and killed.failure() == "ended by SIGKILL"
    assert not (done.folder / runs.JOB).exists() and good.scores() is not None
    assert "about" in lines[1] and "left" in lines[1]
    assert queue.perform(teachers, [good, bad], jobs=2) == [bad]
    with pytest.raises(ValueError, match="jobs = 0: give 1 to"):
        queue.perform(teachers, [good], jobs=0)
    # Asked for something else, a finished run is no longer done.
    asked = dataclasses.replace(done.asked, limit=16)
    assert dataclasses.replace(done, asked=asked).scores() is None


@pytest.fixture
def world(tmp_path):
    write_tiny_pipeline(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red cat\na cat icon\nan icon of a cat\nred\n")
    return tmp_path


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(world, monkeypatch):
    # One device, and little time on what runs for a moment only.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    config = dict(
        name="tiny",
        model=dict(path=str(world / "teacher")),
        prompts=[str(world / "prompts.txt")],
        adapter=dict(rank=2, alpha=2.0, merged=True),
        stages=dict(
            trajectories=dict(
                objective="trajectory_kd",
                steps=2,
                batch_size=16,
                prompts_per_refill=8,
                learning_rate=1e-3,
                settings=dict(segments=2, teacher_substeps=1, guidance_scale=2.0),
            )
        ),
        log_every=1,
        export=(),
    )
    asked = runs.Asked(
        prompts=str(world / "prompts.txt"),
        scorers=(),
        guidance_scale=2.0,
        gamma=1.0,
        steps=(1,),
        limit=3,
    )
    teacher = runs.Run(
        name=runs.TEACHER, seed=0, config=config, asked=asked, folder=world / "first"
    )
    student = dataclasses.replace(teacher, name="tiny", folder=world / "second")
    assert queue.perform({0: teacher}, [student], lambda line: None) == []
    of_teacher, found = teacher.scores(), student.scores()
    assert set(of_teacher["scores"]["teacher"]) == {"25", "4"}
    assert set(found["scores"]) == {"student"} and found["prompts"] == 3
    settings = read(config)
    assert found["forwards"] == budget.total(settings) == 2 * 16 * 3
    assert found["backwards"] == 2 * 16 and found["training_seconds"] > 0
    # The engine's own counter says the same an example.
    rows = [json.loads(line) for line in (student.folder / "metrics.jsonl").open()]
    row = rows[-1]
    assert row["nfe_per_second"] / row["pairs_per_second"] == pytest.approx(3)
    assert accounts(settings, rows)["forwards"] == found["forwards"]
    with np.load(student.folder / runs.PICTURES) as file:
        assert file["student-1"].shape == (3, 32, 32, 3)
