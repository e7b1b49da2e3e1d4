"""What the documents say of the code is what the code says."""

import dataclasses
import re

import pytest

from tlcm_jax import paths
from tlcm_jax.diffusion.timesteps import milestone_indices, student_timesteps
from tlcm_jax.distillation.registry import OBJECTIVES, TERMS
from tlcm_jax.models.lora import LoRAConfig

METHOD = (paths.ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SETTINGS = {"adapter": LoRAConfig, **OBJECTIVES, **TERMS}
# What says where something is or how it is followed, and has no source.
UNSOURCED = {
    "targets", "merged", "weights", "scorers", "held_out", "held_out_weights",
    "optional",
    "stop_on_reward_hacking", "tolerance", "layers", "own_states", "lcd.weight",
    "distribution_matching.weight", "mlcd.snr_limit", "trajectory_kd.segments",
    "trajectory_kd.guidance_scale", "trajectory_kd.snr_limit", "trajectory_kd.rollout_timesteps",
}  # fmt: skip


def values():
    return re.findall(r"^\| `(\w+)\.(\w+)` \| (.*?) \| ([PRIO]).*\|$", METHOD, re.MULTILINE)


def test_the_defaults_of_the_method_are_those_of_the_settings():
    said = values()
    assert len(said) > 30
    for group, name, value, _ in said:
        field = {f.name: f for f in dataclasses.fields(SETTINGS[group])}[name]
        default = field.default
        if isinstance(default, tuple):
            assert tuple(map(int, value.split())) == default, (group, name)
        elif isinstance(default, str):
            assert value == default, (group, name)
        else:
            assert float(value) == default, (group, name)


def test_every_setting_with_a_source_has_one():
    said = {f"{group}.{name}" for group, name, *_ in values()}
    for group, kind in SETTINGS.items():
        for field in dataclasses.fields(kind):
            key = f"{group}.{field.name}"
            assert key in said or {field.name, key} & UNSOURCED, key


def test_the_tables_of_times_are_the_sampler_s():
    rows = dict(re.findall(r"^\| (\d) \| ([\d ]+) \|$", METHOD, re.MULTILINE))
    assert set(rows) == {str(n) for n in range(1, 9)}
    for steps, times in rows.items():
        assert tuple(map(int, times.split())) == student_timesteps(int(steps))
    assert " ".join(map(str, milestone_indices(8))) in METHOD


@pytest.mark.parametrize("folder", ["tlcm_jax", "tests", "benchmarks", "configs", "miniature"])
def test_documents_that_comments_cite_are_there(folder):
    for file in (paths.ROOT / folder).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for cited in re.findall(r"(?<![\w/.])((?:docs|benchmarks|miniature)/[\w./-]+\.md)", text):
            assert (paths.ROOT / cited).is_file(), f"{file} cites {cited}"
        if file.name != "test_docs.py":
            assert "METHOD" not in re.sub(r"\bMETHOD\w+|\w+METHOD", "", text), file


def test_the_readme_says_what_has_not_been_run():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    results = (paths.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "**What has been run:**" in readme
    # Until a page of results has them.
    assert (
        "sdxl" in results.lower().replace("sdxl's prompts", "") or "no training of SDXL" in readme
    )
    assert "tpu" in results.lower() or "nothing on a TPU slice" in readme
