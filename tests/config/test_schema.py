"""Reading recipes: what is accepted, and what the messages say."""

import copy
import importlib.util

import pytest

from tlcm_jax import paths
from tlcm_jax.config.schema import read

MINIMAL = {
    "name": "test",
    "model": {"path": "somewhere"},
    "prompts": ["prompts.txt"],
    "stages": {
        "first": {
            "objective": "segment_consistency",
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
    assert stage.terms["distribution_matching"].critic_updates == 5
    assert read(MINIMAL).stages["first"].terms == {}


def test_a_term_of_weight_0_is_as_one_that_is_not_there():
    preference = {"scorer": "miniature.contrastive", "weights": "nowhere", "weight": 0}
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
        (changed(stages__first__objective="nothing"), "unknown stage 'nothing'"),
        (changed(stages__first__steps="2"), "'stages.first.steps' must be int"),
        (changed(seed=True), "'seed' must be int"),
        (changed(prompts="prompts.txt"), "'prompts' must be a list"),
        (changed(model={}), "'model.path' is missing"),
        (changed(model__dtype="float16"), "model.dtype = 'float16': must be one of"),
        (changed(stages={}), "stages: the recipe has none"),
        (changed(adapter={"rank": 0}), "adapter.rank = 0"),
        (changed(stages__first__settings={"skip": 0}), "skip = 0: must be at least 1"),
        (changed(stages__first__terms={"gan": {}}), "unknown term 'gan'; known: latent_lpips"),
        (
            changed(stages__first__terms={"adversarial": {"weight": -1}}),
            "stages.first.terms.adversarial: weight = -1.0: must be at least 0",
        ),
        (
            changed(stages__first__terms={"preference": {"scorer": "a"}}),
            "'stages.first.terms.preference.weights' is missing",
        ),
        (changed(stages__first__objective=["a"]), "'stages.first.objective' must be a name"),
        (changed(stages__first=3), "'stages.first' must be a mapping"),
        (changed(stages__first__steps=0), "stages.first: steps = 0: must be at least 1"),
        (changed(stages__first__batch_size=0), "batch_size = 0: must be at least 1"),
        (changed(stages__first__final_fraction=-1), "final_fraction = -1.0: must be at least 0"),
        (changed(stage_order=["first", "first"]), "must name each of stages"),
        (changed(keep_checkpoints=0), "keep_checkpoints = 0: must be at least 1"),
        (changed(seed=-1), "seed = -1: must lie in 0 to"),
        (changed(model__resolution=-64), "model.resolution = -64: must be at least 0"),
        (changed(adapter={"targets": []}), "adapter.targets is empty"),
        (changed(evaluation={"prompts": ["a"], "gamma": 2}), "evaluation: gamma = 2.0"),
        (
            changed(
                stages__first__settings=dict(
                    mode="data", solver="sde", loss_space="x0", segments=1, landing="trajectory"
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


@pytest.mark.parametrize("name", sorted(p.stem for p in (paths.ROOT / "configs").glob("*.py")))
def test_shipped_recipes_read(name):
    spec = importlib.util.spec_from_file_location(name, paths.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read(module.get_config().to_dict()).name
    with pytest.raises(ValueError, match="has no variant"):
        module.get_config("unheard-of")
