"""Evaluation: what is compared with what, what is written, and what is kept from run to run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax import evaluate as command
from tlcm_jax.config.workdir import trained_resolution
from tlcm_jax.data.prompt_sets import PromptSet, read_prompt_set
from tlcm_jax.evaluation import contestants
from tlcm_jax.evaluation import evaluate as evaluation
from tlcm_jax.evaluation import report as evaluation_report
from tlcm_jax.evaluation.evaluate import evaluate
from tlcm_jax.evaluation.scorers.base import Measure, Scorer
from tlcm_jax.families.load import load_model
from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.generation.generate import GenerationOptions, generate, generate_teacher
from tlcm_jax.io.lora_export import write_lora
from tlcm_jax.models import lora

PROMPTS = ("a red cat", "an icon", "a cat of ice", "red")
STYLES = ("flat", "round", "flat", "flat")


class Brightness(Scorer):
    """A scorer of sets whose scores are known: mean grey, and the spread over all pixels."""

    name = "brightness"
    measures = (
        Measure(key="grey", title="grey", percent=True),
        Measure(key="contrast", title="contrast", higher_is_better=False),
    )

    def check(self, prompts, annotations):
        if "style" not in annotations:
            raise ValueError("brightness needs a style")

    def values(self, images, prompts, annotations):
        assert len(images) == len(prompts) == len(annotations["style"])
        return {"pixels": images.reshape(len(images), -1)}

    def summarise(self, values):
        pixels = values["pixels"]
        return {"grey": float(pixels.mean() / 255), "contrast": float(pixels.std())}

    def real_data_score(self, prompt_set, count):
        return {"grey": 0.75} if prompt_set == "heldout" else {}


class Red(Scorer):
    """A second one, of single images."""

    name = "red"

    def values(self, images, prompts, annotations):
        return {"red": images[..., 0].mean((1, 2))}

    def real_data_score(self, prompt_set, count):
        return {"red": 100.0 + count} if prompt_set == "heldout" else {}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_model(write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def adapter(pipeline):
    fresh = lora.init(pipeline.params["unet"], ("to_q", "conv1"), 2, jax.random.key(0))
    return random_adapter(fresh, np.random.default_rng(0), 0.3)


@pytest.fixture(scope="module")
def heldout():
    return PromptSet(name="heldout", prompts=PROMPTS, annotations={"style": STYLES})


@pytest.fixture(scope="module")
def result(pipeline, adapter, heldout, tmp_path_factory):
    """Student with adapter at 1 and 4 steps, and the teacher, scored, on two sets."""
    other = PromptSet(name="other", prompts=("cat",) * 4, annotations={"style": ("flat",) * 4})
    return evaluate(
        pipeline,
        [heldout, other],
        lora=adapter,
        teacher=pipeline,
        steps=(4, 1),
        further_steps=(4,),
        guidance_scales=(2.0,),
        gammas=(0.5,),
        seed=5,
        scorers=[Brightness(), Red()],
        store=tmp_path_factory.mktemp("images"),
    )


def test_images_are_those_of_the_samplers(pipeline, adapter, result):
    first = result.sets[0]
    order = [("student", 1), ("student", 4), ("teacher", 25), ("teacher", 4)]
    assert [(one.kind, one.steps) for one in first.generated] == order
    assert [(one.kind, one.steps) for one in result.sets[1].generated] == order[1:3]
    np.testing.assert_array_equal(
        first.find("student", 4).images,
        generate(pipeline, PROMPTS, 4, 5, adapter, 0.5, GenerationOptions(batch_size=25)),
    )
    np.testing.assert_array_equal(
        first.find("teacher", 4).images,
        generate_teacher(pipeline, PROMPTS, 4, 2.0, 5, GenerationOptions(batch_size=25)),
    )


def test_metrics_hold_every_score_and_its_ratio_to_the_teacher(result):
    metrics = json.loads(json.dumps(result.metrics()))
    assert set(metrics) == {"model", "seed", "guidance_scale", "gamma", "seconds", "sets"}
    assert set(metrics["seconds"]) == {"generation", "scoring"}
    assert metrics["sets"]["other"]["real"] == {}
    heldout = metrics["sets"]["heldout"]
    assert heldout["prompts"] == 4 and heldout["real"] == {"grey": 0.75, "red": 104.0}
    assert set(heldout["student"]) == {"1", "4"} and set(heldout["teacher"]) == {"25", "4"}
    reference = heldout["teacher"]["25"]
    assert set(reference) == {"grey", "contrast", "red", "intervals"}
    assert reference["intervals"].keys() == {"red"}  # the others are of whole sets
    for entry in (*heldout["student"].values(), heldout["teacher"]["4"]):
        for key in ("grey", "contrast", "red"):
            assert entry["relative"][key] == pytest.approx(entry[key] / reference[key], rel=1e-12)


def test_report_and_files_show_all_samplers(result, tmp_path):
    report = evaluation_report.build_report(result, title="Tiny", pictures=3, summary="Small.")
    assert report.reference == "teacher, 25 steps"
    assert [row.kind for row in report.scores] == ["student"] * 2 + ["teacher"] * 2 + ["real"]
    assert report.scores[1].scores["other/grey"] == result.sets[1].generated[0].scores["grey"]
    assert report.scores[0].score("other/grey") is None
    assert {column.key for column in report.columns if not column.higher_is_better} == {
        "heldout/contrast",
        "other/contrast",
    }
    assert {column.key for column in report.columns if column.percent} == {
        "heldout/grey",
        "other/grey",
    }
    assert len(report.highlights) == 3
    # One of each style before a second of any.
    assert list(report.grids[0].prompts) == ["a red cat", "an icon", "a cat of ice"]
    np.testing.assert_array_equal(
        report.grids[0].rows[2].images, result.sets[0].generated[2].images[:3]
    )
    evaluation_report.save(tmp_path / "out", result, report)
    table = (tmp_path / "out/scores.md").read_text().splitlines()
    assert table[0].startswith("|  | heldout: grey | heldout: contrast | heldout: red score |")
    first = result.sets[0].generated[0]
    low, high = first.intervals["red"]
    assert table[2].startswith(f"| student, 1 step | {100 * first.scores['grey']:.1f} % |")
    assert f"{first.scores['red']:.0f} ({low:.0f} to {high:.0f})" in table[2]
    assert len(table) == 2 + 5
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == result.metrics()
    assert "Tiny" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "out/samples/other.png") as sheet:
        assert sheet.width > 2 * 128


@pytest.fixture
def drawn(monkeypatch):
    """Who was drawn, in how many steps and how many prompts, in order."""
    found = []

    def counting(name, function, steps_of):
        def counted(*arguments, **options):
            images = function(*arguments, **options)
            found.append((name, steps_of(arguments), len(images)))
            return images

        return counted

    by_sampler = counting("student", contestants.generate_by, lambda a: a[0].steps)
    by_teacher = counting("teacher", contestants.generate_teacher, lambda a: a[2])
    monkeypatch.setattr(contestants, "generate_by", by_sampler)
    monkeypatch.setattr(contestants, "generate_teacher", by_teacher)
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", (2,))
    return found


def test_images_are_made_once_for_what_they_depend_on(pipeline, adapter, heldout, tmp_path, drawn):
    plain = dataclasses.replace(heldout, annotations={})

    def run(model=pipeline, teacher=pipeline, **options):
        found = evaluate(model, [plain], teacher=teacher, steps=[1], store=tmp_path, **options)
        new = list(drawn)
        drawn.clear()
        return found.sets[0].find("teacher", 2).images, new

    both = [("student", 1, 4), ("teacher", 2, 4)]
    first, new = run()
    assert new == both
    again, new = run()
    assert new == [] and np.array_equal(again, first)
    assert run(lora=adapter)[1] == both[:1]
    assert run(gammas=(0.5,))[1] == both[:1]
    assert run(guidance_scales=(3.0,))[1] == both[1:]
    assert run(seed=1)[1] == both
    bias = pipeline.params["unet"]["conv_out"]["bias"]
    changed = {**pipeline.params["unet"], "conv_out": {**pipeline.params["unet"]["conv_out"]}}
    changed["conv_out"]["bias"] = bias.at[0].add(1e-3)
    other = dataclasses.replace(pipeline, params={**pipeline.params, "unet": changed})
    assert run(teacher=other)[1] == both[1:]


def test_a_damaged_image_is_drawn_again_and_said(pipeline, heldout, tmp_path, drawn, caplog):
    plain = dataclasses.replace(heldout, annotations={})

    def run():
        return evaluate(pipeline, [plain], steps=[1], store=tmp_path).sets[0].generated[0].images

    first = run()
    files = sorted(tmp_path.rglob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(4)]
    for damage in (b"", files[2].read_bytes()[:60], b"not a picture"):
        files[2].write_bytes(damage)
        caplog.clear()
        assert np.array_equal(run(), first)
        assert "000002.png is damaged" in caplog.text and "drawn again" in caplog.text
    files[1].unlink()
    assert np.array_equal(run(), first)
    assert drawn == [("student", 1, 4)] * 5


def test_what_was_made_before_a_stop_is_not_made_again(
    pipeline, heldout, tmp_path, drawn, monkeypatch
):
    """Chunk by chunk; their images and scores are those of all prompts at once."""
    monkeypatch.setattr(contestants, "_CHUNK", 2)
    many = PromptSet(name="many", prompts=(*PROMPTS, "ice"))

    def run(scorer, store):
        return evaluate(pipeline, [many], steps=[1], scorers=[scorer], store=store, batch_size=1)

    class Killed(Red):
        def values(self, images, prompts, annotations):
            if "ice" in prompts:
                raise KeyboardInterrupt
            return super().values(images, prompts, annotations)

    whole = run(Red(), None)
    assert drawn == [("student", 1, 2), ("student", 1, 3)]
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        run(Killed(), tmp_path)
    drawn.pop()  # the second chunk was made, and is there
    one = next(tmp_path.rglob("000004.png"))
    one.unlink()
    resumed = run(Red(), tmp_path)
    assert drawn == [("student", 1, 2), ("student", 1, 3)]
    ours, theirs = (found.sets[0].generated[0] for found in (resumed, whole))
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert ours.scores == theirs.scores and ours.intervals == theirs.intervals
    expected = generate(pipeline, many.prompts, 1, 0, options=GenerationOptions(batch_size=5))
    assert np.max(np.abs(ours.images.astype(int) - expected.astype(int))) <= 1


def test_several_samplers_and_scales_are_told_apart(pipeline, heldout, monkeypatch):
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", (2,))
    found = evaluate(
        pipeline,
        [heldout],
        teacher=pipeline,
        steps=[2],
        samplers=("consistency", "euler"),
        gammas=(1.0, 0.0),
        guidance_scales=(1.0, 2.0),
        scorers=[Red()],
        pictures=2,
    )
    labels = [one.by.label for one in found.sets[0].generated]
    assert labels == [
        "student, 2 steps, consistency, gamma 1",
        "student, 2 steps, consistency, gamma 0",
        "student, 2 steps, euler",
        "teacher, 2 steps, guidance 1",
        "teacher, 2 steps, guidance 2",
    ]
    images = [one.images for one in found.sets[0].generated]
    assert all(each.shape[0] == 2 for each in images)
    assert len({each.tobytes() for each in images}) == 5
    keys = found.metrics()["sets"]["heldout"]["student"].keys()
    assert keys == {"2, consistency, gamma 1", "2, consistency, gamma 0", "2, euler"}
    report = evaluation_report.build_report(found, title="Several", pictures=4)
    assert len(report.grids[0].prompts) == 2 and len(report.scores) == 6
    with pytest.raises(ValueError, match="sampler 'heun' is not one of consistency, lcm"):
        evaluate(pipeline, [heldout], samplers=("heun",))


def test_without_scorer_or_teacher_there_are_pictures(pipeline, heldout, tmp_path):
    result = evaluate(pipeline, [heldout], steps=[1])
    metrics = result.metrics()
    assert metrics["guidance_scale"] is None
    assert metrics["sets"]["heldout"]["student"] == {"1": {}}
    report = evaluation_report.build_report(result, title="Pictures")
    assert not report.scores and not report.highlights and report.reference is None
    assert "gamma" not in report.grids[0].note and "guidance" not in report.grids[0].note
    evaluation_report.save(tmp_path, result, report)
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_what_cannot_be_evaluated_is_refused_before_drawing(pipeline, heldout, monkeypatch):
    monkeypatch.setattr(contestants, "generate_by", None)
    plain = dataclasses.replace(heldout, annotations={})
    with pytest.raises(ValueError, match="needs a style"):
        evaluate(pipeline, [plain], scorers=[Brightness()])
    with pytest.raises(ValueError, match="steps = 9"):
        evaluate(pipeline, [heldout], steps=[1, 9])
    with pytest.raises(ValueError, match="steps is empty"):
        evaluate(pipeline, [heldout], steps=[])
    with pytest.raises(ValueError, match="its own name"):
        evaluate(pipeline, [heldout, heldout])


def test_annotations_are_read_from_beside_the_prompts(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("a red cat\nan icon\n")
    assert read_prompt_set(file) == PromptSet(name="few", prompts=("a red cat", "an icon"))
    rows = [{"prompt": "a red cat", "label": "cat"}, {"prompt": "an icon", "label": "icon"}]
    beside = tmp_path / "few.json"
    beside.write_text(json.dumps(rows))
    few = read_prompt_set(file, "heldout")
    assert few.name == "heldout" and few.annotations == {"label": ["cat", "icon"]}
    assert few.first(1).annotations == {"label": ["cat"]} and few.first(0) is few
    for content, message in (
        ("{", "not valid JSON"),
        ("{}", "a list of objects"),
        (json.dumps(rows[::-1]), "from prompt 1 on"),
        (json.dumps(rows[:1]), "from prompt 2 on .1 and 2 prompts."),
        (json.dumps([rows[0], {"prompt": "an icon"}]), "entry 2 lacks 'label'"),
    ):
        beside.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompt_set(file)


def run_command(*arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["evaluate", *map(str, arguments)])
    command.run(values)


def test_the_command_compares_a_lora_with_its_base(pipeline, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", (2,))
    prompts, output, file = (tmp_path / name for name in ("few.txt", "out", "lora.safetensors"))
    prompts.write_text("a red cat\nan icon\nred\ncat\nice\n")
    write_lora(file, adapter, LORA_NAMES)
    given = (f"--model={pipeline.source}", f"--prompts={prompts}", f"--output={output}")
    run_command(*given, f"--lora={file}", "--steps=2,1", "--limit=4")
    metrics = json.loads((output / "metrics.json").read_text())
    few = metrics["sets"]["few"]
    assert few["prompts"] == 4 and metrics["guidance_scale"] == 8.0
    assert (list(few["student"]), list(few["teacher"])) == (["1", "2"], ["2"])
    assert len(list((output / "images/few").rglob("*.png"))) == 3 * 4
    lines = (output / "scores.md").read_text()
    assert lines == "No scores were asked for.\n"
    for wrong, message in (
        ("--scores=miniature.judge,clap", "unknown scorer 'clap'; known: "),
        ("--steps=4,ten", "'ten' is not a number"),
        ("--gamma=0,half", "--gamma 0,half: give numbers"),
        ("--sampler=heun", "sampler 'heun' is not one of"),
        ("--baseline=dmd3=x", "write NAME=PATH or NAME:STEPS=PATH; names: lcm, lightning"),
        (f"--baseline=lightning={file}", "for one number of steps, 2, 4, 8: write lightning:2="),
        (f"--baseline=lightning:3={file}", "lightning is made for 2, 4, 8 steps"),
        (f"--baseline=dmd2={file}", "made for 4 steps, and --steps asks for 1, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run_command(*given, "--steps=1,2", wrong)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors does not exist"):
        run_command(*given, "--baseline=dmd2=nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no judge"):
        run_command(*given, f"--scores=miniature.judge={tmp_path}")


def test_the_command_cuts_batches_over_all_devices(pipeline, tmp_path, monkeypatch):
    """The same images as on one device."""
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", (2,))
    seen = []
    original = command.evaluate

    def evaluated(model, *arguments, **options):
        seen.append(jax.tree.leaves(model.params["unet"])[0].sharding)
        return original(model, *arguments, **options)

    monkeypatch.setattr(command, "evaluate", evaluated)
    prompts = tmp_path / "few.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    run_command(f"--model={pipeline.source}", f"--prompts={prompts}", "--steps=2",
                f"--output={tmp_path / 'out'}")  # fmt: skip
    assert len(seen[0].device_set) == len(jax.devices()) == 8 and seen[0].is_fully_replicated
    files = sorted((tmp_path / "out/images").rglob("*.png"))
    found = np.stack([np.asarray(Image.open(file)) for file in files])
    expected = generate(pipeline, PROMPTS, 2, 0)
    assert np.max(np.abs(found.astype(int) - expected.astype(int))) <= 1


def test_a_run_s_own_resolution_is_what_is_drawn(pipeline, heldout, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": {"resolution": 64}}))
    assert trained_resolution(tmp_path) == 64 and trained_resolution(tmp_path / "other") is None
    found = evaluate(pipeline, [heldout], steps=(1,), resolution=64)
    assert found.sets[0].generated[0].images.shape == (4, 64, 64, 3)
    found = evaluate(pipeline, [heldout], steps=(1,), resolution="48x32", store=tmp_path / "kept")
    assert found.sets[0].generated[0].images.shape == (4, 32, 48, 3)
