"""Reading recipes: what is accepted, and what the messages say."""

import copy
import dataclasses
import importlib.util
import re

import pytest

from tlcm_jax import paths
from tlcm_jax.config.schema import (
    MAY_CHANGE,
    RENAMED,
    EvaluationSettings,
    ModelSettings,
    Settings,
    StageSettings,
    read,
)
from tlcm_jax.distillation.registry import OBJECTIVES, TERMS
from tlcm_jax.training.workdir import claim_workdir

MINIMAL = {
    "name": "test",
    "model": {"path": "somewhere"},
    "prompts": ["prompts.txt"],
    "stages": {
        "first": {
            "objective": "mlcd",
            "steps": 2,
            "batch_size": 4,
            "learning_rate": 1,
            "settings": {"skip": 10},
        }
    },
}


def changed(**dotted):
    config = copy.deepcopy(MINIMAL)
    for path, value in dotted.items():
        *parents, last = path.split("__")
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
    return config


def test_minimal_recipe_takes_defaults():
    settings = read(MINIMAL)
    stage = settings.stages["first"]
    assert stage.settings.skip == 10 and stage.settings.segments == 8
    assert stage.learning_rate == 1.0 and isinstance(stage.learning_rate, float)
    assert settings.adapter.scale == 0.125


def test_stage_order():
    config = changed(stages__alpha=dict(MINIMAL["stages"]["first"]))
    assert list(read(config | {"stage_order": ["first", "alpha"]}).stages) == ["first", "alpha"]
    with pytest.raises(ValueError, match="stage_order .* must name each"):
        read(config | {"stage_order": ["first"]})


def test_terms_are_settings_of_a_stage():
    terms = {"adversarial": {"weight": 0.1, "layers": ["mid_block"]}, "distribution_matching": {}}
    stage = read(changed(stages__first__terms=terms)).stages["first"]
    assert list(stage.terms) == ["adversarial", "distribution_matching"]
    assert stage.terms["adversarial"].layers == ("mid_block",)
    assert stage.terms["distribution_matching"].aux_updates == 5
    assert read(MINIMAL).stages["first"].terms == {}


def test_a_term_of_weight_0_is_as_one_that_is_not_there():
    liked = {"scorer": "miniature.contrastive", "weights": "nowhere"}
    preference = {"scorers": {"liked": liked}, "weight": 0}
    assert read(changed(stages__first__terms={"preference": preference})) == read(MINIMAL)


def test_progressive_segments_are_a_list_of_stages():
    """MLCM's M = 8, 4, 2: one objective three times, each with its own settings."""
    first = MINIMAL["stages"]["first"]
    names = {f"m{m}": dict(first, settings={"segments": m}) for m in (8, 4, 2)}
    settings = read(dict(MINIMAL, stages=names, stage_order=["m8", "m4", "m2"]))
    assert [stage.settings.segments for stage in settings.stages.values()] == [8, 4, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(sed=1), "unknown config key 'sed'; did you mean 'seed'"),
        (changed(model__pth="x"), "unknown config key 'model.pth'; did you mean 'path'"),
        (changed(stages__first__settings={"skips": 1}), "stages.first.settings.skips"),
        (changed(stages__first__objective="nothing"), "unknown 'nothing'; known: mlcd, lcd"),
        (changed(stages__first__steps="2"), "'stages.first.steps' must be int"),
        (changed(seed=True), "'seed' must be int"),
        (changed(prompts="prompts.txt"), "'prompts' must be a list"),
        (changed(model={}), "'model.path' is missing"),
        (changed(model__dtype="float16"), "model.dtype = 'float16': must be one of"),
        (changed(stages={}), "stages: the recipe has none"),
        (changed(adapter={"rank": 0}), "adapter.rank = 0"),
        (changed(stages__first__settings={"skip": 0}), "skip = 0: must be at least 1"),
        (changed(stages__first__terms={"gan": {}}), "unknown 'gan'; known: latent_lpips"),
        (
            changed(stages__first__terms={"adversarial": {"weight": -1}}),
            "stages.first.terms.adversarial: weight = -1.0: must be at least 0",
        ),
        (
            changed(stages__first__terms={"preference": {}}),
            "'stages.first.terms.preference.scorers' is missing",
        ),
        (
            changed(stages__first__terms={"preference": {"scorers": {"mps": {"weight": -1}}}}),
            "stages.first.terms.preference.scorers.mps: weight = -1.0: must be at least 0",
        ),
        (
            changed(stages__first__terms={"preference": {"scorers": {"mps": "scorers/mps"}}}),
            "'stages.first.terms.preference.scorers.mps' must be a mapping, got 'scorers/mps'",
        ),
        (changed(stages__first__objective=["a"]), "'stages.first.objective' must be a name"),
        (changed(stages__first=3), "'stages.first' must be a mapping"),
        (changed(stages__first__steps=0), "stages.first: steps = 0: must be at least 1"),
        (changed(stages__first__batch_size=0), "batch_size = 0: must be at least 1"),
        (changed(stages__first__final_fraction=-1), "final_fraction = -1.0: must be at least 0"),
        (changed(stage_order=["first", "first"]), "must name each of stages"),
        (changed(keep_checkpoints=0), "keep_checkpoints = 0: must be at least 1"),
        (changed(seed=-1), "seed = -1: must lie in 0 to"),
        (changed(model__resolution=-64), "model.resolution -64: must be at least 1"),
        (changed(adapter={"targets": []}), "adapter.targets is empty"),
        (changed(evaluation={"prompts": ["a"], "gamma": 2}), "evaluation: gamma = 2.0"),
        (
            changed(
                stages__first__settings=dict(
                    mode="data", solver="sde", loss_space="x0", segments=1, target_time="uniform"
                )
            ),
            "solver = 'sde': compares x0 over one whole segment only",
        ),
        (changed(trainable="lora"), "trainable = 'lora': must be one of adapter, full"),
        (changed(trainable="full"), "a UNet trained whole has no LoRA; export 'pipeline'"),
    ],
)
def test_bad_recipes_name_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        read(config)


def test_a_network_trained_whole_is_exported_whole():
    full = changed(trainable="full", export=["pipeline", "unet"])
    assert read(full).export == ("pipeline", "unet")
    for target in ("lora", "kohya"):
        with pytest.raises(ValueError, match="has no LoRA; export 'pipeline'"):
            read(changed(trainable="full", export=["pipeline", target]))


def test_bounds_themselves_are_allowed():
    for config in (
        changed(seed=2**32 - 1),
        changed(stages__first__learning_rate=0),
        changed(stages__first__ema_decay=0.999),
        changed(evaluation={"prompts": ["a"], "gamma": 0, "guidance_scale": 0, "limit": 0}),
        changed(sample_every=0, log_every=1, checkpoint_every=1, keep_checkpoints=1),
    ):
        assert read(config).name == "test"


def test_prompts_of_a_refill_are_those_of_an_update_unless_said():
    assert read(MINIMAL).stages["first"].refill == 4
    assert read(changed(stages__first__prompts_per_refill=3)).stages["first"].refill == 3


def test_gamma_0_is_a_choice_and_not_an_absence():
    assert read(changed(evaluation={"prompts": ["a"], "gamma": 0})).evaluation.gamma == 0.0
    assert read(changed(evaluation={"prompts": ["a"]})).evaluation.gamma == 1.0
    assert read(changed(evaluation=None)).evaluation is None


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_or_name_is_refused_with_its_new_name(old):
    """Wherever it stood: in a stage, its settings or its terms."""
    new = RENAMED[old]
    for config in (
        changed(**{f"stages__first__{old}": 1}),
        changed(stages__first__settings={old: 1}),
        changed(stages__first__terms={"adversarial": {old: 1}}),
    ):
        with pytest.raises(ValueError, match=rf"{old}'; it is {re.escape(new)} now"):
            read(config)
    for config in (
        changed(stages__first__objective=old),
        changed(stages__first__terms={old: {}}),
    ):
        with pytest.raises(ValueError, match=rf"unknown '{old}'; it is {re.escape(new)} now"):
            read(config)


def test_no_renamed_name_is_one_that_there_is():
    """Else its message could never be read, or would be wrong."""
    kinds = (Settings, ModelSettings, StageSettings, EvaluationSettings, *OBJECTIVES.values(),
             *TERMS.values())  # fmt: skip
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert not set(RENAMED) & (fields | set(OBJECTIVES) | set(TERMS))
    # And what the messages name is there.
    for now in RENAMED.values():
        named = re.findall(r"`(\w+)`", now) or [now.strip('"')]
        assert set(named) <= fields | set(OBJECTIVES)


CONFIG = dict(
    MINIMAL,
    seed=0,
    latents="",
    text_cache="",
    adapter={"rank": 4, "alpha": 1.0, "merged": False},
    trainable="adapter",
    mesh={"data": -1, "fsdp": 1},
    log_every=10,
    sample_every=0,
    checkpoint_every=100,
    keep_checkpoints=2,
    keep_every=0,
    keep_stage_ends=False,
    keep_best="",
    max_skipped_updates=10,
    evaluation={"prompts": ["a.txt"], "gamma": 1.0},
    export=["lora"],
)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Settings)])
def test_a_workdir_is_resumed_only_if_what_changed_is_not_what_is_learnt(tmp_path, key):
    """Every key but those of MAY_CHANGE, at every depth."""
    claim_workdir(tmp_path, CONFIG, may_change=MAY_CHANGE)
    changes = list(one_change_each(CONFIG[key], key)) + [(key, None)]
    for path, value in changes:
        config = dict(CONFIG, **{key: value})
        if key in MAY_CHANGE:
            claim_workdir(tmp_path, config, may_change=MAY_CHANGE, write=False)
        else:
            with pytest.raises(ValueError, match=rf"\n  {re.escape(path)}"):
                claim_workdir(tmp_path, config, may_change=MAY_CHANGE)


def one_change_each(value, path):
    """A value with each of its leaves changed in turn, beside the leaf's dotted name."""
    if isinstance(value, dict):
        for name, below in value.items():
            for where, changed in one_change_each(below, f"{path}.{name}"):
                yield where, {**value, name: changed}
        yield f"{path}.more", {**value, "more": 1}
    else:
        yield path, [value, value]


def test_what_may_change_is_what_it_says_it_is():
    """A key that is added to the recipe is fixed unless someone decides otherwise."""
    fixed = {field.name for field in dataclasses.fields(Settings)} - set(MAY_CHANGE)
    assert fixed == {"name", "seed", "model", "prompts", "latents", "adapter", "trainable",
                     "stages"}  # fmt: skip


# What has recipes of its variants alone, and a trainer's flags: each has tests of its own.
OTHERS = {"shapes_relatives", "sdxl_zh"}
RECIPES = sorted({p.stem for p in (paths.ROOT / "configs").glob("*.py")} - OTHERS)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_read(name):
    spec = importlib.util.spec_from_file_location(name, paths.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read(module.get_config().to_dict()).name
    with pytest.raises(ValueError, match="has no variant"):
        module.get_config("unheard-of")
