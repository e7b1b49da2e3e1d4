"""The tables: what a recipe can name, and what it could in older ones."""

import inspect

import pytest

from tlcm_jax.config import schema
from tlcm_jax.distillation.objective import Objective
from tlcm_jax.distillation.registry import OBJECTIVES, TERMS


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_builds_with_its_defaults(any_world, name):
    objective = OBJECTIVES[name]().build(any_world.networks)
    assert isinstance(objective, Objective)
    assert objective.networks is any_world.networks
    assert objective.pairs_per_prompt >= 1 and objective.nfe_per_pair.student == 1


@pytest.mark.parametrize("name", TERMS)
def test_every_term_has_a_weight_and_a_loader(name):
    fields = TERMS[name].__dataclass_fields__
    assert fields["weight"].default >= 0
    loaded = list(inspect.signature(TERMS[name].load).parameters)
    assert loaded == ["self", "model", "networks", "adapter"]


def stage(objective="mlcd", terms=None, **settings):
    return {"objective": objective, "settings": settings, "terms": terms or {}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (stage("segment_consistency"), "unknown 'segment_consistency'; it is \"mlcd\" now"),
        (stage("endpoint_consistency"), "unknown 'endpoint_consistency'; it is \"lcd\" now"),
        (stage("trajectory_regression"), 'it is "trajectory_kd" now'),
        (stage("gan"), "unknown 'gan'; known: mlcd, lcd, trajectory_kd"),
        (stage(nodes_per_segment=2), "'stages.one.settings.nodes_per_segment'; it is `points_per_"),
        (stage(landing="trajectory"), "settings.landing'; it is `target_time`"),
        (stage(mode="literal"), "mode = 'literal': must be one of node_reuse, paper"),
        (stage(mode="single_step"), "mode = 'single_step': must be one of node_reuse, paper"),
        (stage(target="average"), "target = 'average': must be one of student, ema"),
        (stage(target_time="trajectory"), "must be one of milestone, uniform"),
        (stage(terms={"gan": {}}), "unknown 'gan'; known: latent_lpips, preference"),
        (stage(terms={"preference": {"share": 0.3}}), "share'; it is `max_grad_ratio` now"),
        (stage(terms={"preference": {"scorer": "a"}}), "scorer'; it is `scorers`, a mapping"),
        (stage(terms={"preference": {"threshold": 3.0}}), "'; it is each scorer's own, in"),
        (stage(terms={"preference": {"judge": "a"}}), "judge'; it is `held_out` now"),
        (stage(terms={"preference": {"judge_weights": ""}}), "it is `held_out_weights` now"),
        (stage(terms={"preference": {"stop_when_parted": True}}), "`stop_on_reward_hacking` now"),
        (stage(terms={"adversarial": {"critic_updates": 2}}), "it is `aux_updates` now"),
        (stage(terms={"adversarial": {"critic_learning_rate": 1e-4}}), "`aux_learning_rate` now"),
        (stage(terms={"adversarial": {"real": "goal"}}), "must be one of sample, target"),
    ],
)
def test_names_of_older_recipes_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        schema.read({"stages": {"one": raw}})
