"""The recipes of the world of shapes: each fits the teacher, and asks what its method asks."""

import functools

import pytest

from configs import shapes, shapes_full, shapes_relatives
from tlcm_jax import paths
from tlcm_jax.config.build import load_losses
from tlcm_jax.config.schema import read
from tlcm_jax.diffusion.timesteps import student_timesteps
from tlcm_jax.families.load import abstract_model

VARIANTS = ("lcm", "pcm", "hyper_sd", "dmd2", "decoupled_dmd", "tdm", "logcd", "mcm", "scott")


@functools.cache
def settings_of(variant):
    return read(shapes_relatives.get_config(variant).to_dict())


def test_all_are_listed_and_another_is_refused_by_name():
    assert set(shapes_relatives._RECIPES) == set(VARIANTS)
    assert all(f":{name} " in shapes_relatives.__doc__ for name in VARIANTS)
    with pytest.raises(ValueError, match="has no variant 'sdxl'; use ':lcm'"):
        shapes_relatives.get_config("sdxl")
    with pytest.raises(ValueError, match="has no variant 'all'; use ':paper' or ':stages'"):
        shapes_full.get_config("all")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_relative_has_the_world_s_teacher_prompts_and_epsilon(variant):
    settings, default = settings_of(variant), read(shapes.get_config().to_dict())
    assert settings.model == default.model and settings.prompts == default.prompts
    assert settings.evaluation.prompts == default.evaluation.prompts
    scales = {s.settings.guidance_scale for s in settings.stages.values() if s.settings}
    assert scales - {8.0} <= {default.evaluation.guidance_scale}  # 8: where no teacher walks
    assert all(stage.adam_eps == shapes.ADAM_EPS for stage in settings.stages.values())
    pairs = [stage.batch_size for stage in settings.stages.values()]
    assert set(pairs) <= {32, 34}


@pytest.mark.parametrize("variant", ["lcm", "pcm", "dmd2", "decoupled_dmd", "tdm", "logcd"])
def test_relatives_fit_the_teacher(variant):
    settings = settings_of(variant)
    losses = load_losses(settings, abstract_model(str(paths.MINIATURE / "shapes-xl")))
    assert list(losses) == list(settings.stages)


@pytest.mark.parametrize("variant", ["dmd2", "decoupled_dmd", "tdm"])
def test_matching_alone_is_asked_at_the_states_of_the_sampler(variant):
    (stage,) = settings_of(variant).stages.values()
    assert stage.settings.weight == 0 and stage.settings.states == "visited"
    assert stage.settings.rollout_timesteps == student_timesteps(4)
    assert stage.settings.rollout_gamma == settings_of(variant).evaluation.gamma
    chosen = stage.terms["distribution_matching"]
    kind = {"dmd2": ("prediction", "shared"), "tdm": ("state", "shared")}
    assert (chosen.noised, chosen.guidance_times) == kind.get(variant, ("prediction", "own"))
    assert ("adversarial" in stage.terms) == (variant == "dmd2")


def test_logcd_has_no_square_and_no_preference_in_its_second_stage():
    stage = settings_of("logcd").stages["endpoints"]
    assert stage.settings.distance == "none" and len(stage.settings.rollout_timesteps) == 3
    assert set(stage.terms) == {"latent_lpips", "adversarial"}
    hinge = stage.terms["adversarial"]
    assert (hinge.real, hinge.loss) == ("target", "hinge")
