import pytest

from tlcm_jax.distillation import registry as stages
from tlcm_jax.distillation.lcd import EndpointConsistencySettings
from tlcm_jax.distillation.mlcd import SegmentConsistencySettings
from tlcm_jax.distillation.objective import Objective


@pytest.mark.parametrize("name", stages.STAGES)
def test_every_stage_builds_with_its_defaults(world, name):
    objective = stages.build(name, world.networks, world.schedule, world.shape)
    assert isinstance(objective, Objective)


def test_an_unknown_stage_is_refused_with_the_known_ones(world):
    known = "unknown stage 'mlcd'; known: segment_consistency, endpoint_consistency"
    with pytest.raises(ValueError, match=known):
        stages.build("mlcd", world.networks, world.schedule, world.shape)


def test_settings_of_another_stage_are_refused(world):
    with pytest.raises(TypeError, match="takes EndpointConsistencySettings, not Segment"):
        stages.build(
            "endpoint_consistency",
            world.networks,
            world.schedule,
            world.shape,
            SegmentConsistencySettings(),
        )


def test_settings_that_do_not_fit_the_schedule_are_refused_before_a_step(world):
    settings = EndpointConsistencySettings(teacher_substeps=500)
    with pytest.raises(ValueError, match="teacher_substeps = 500"):
        stages.build("endpoint_consistency", world.networks, world.schedule, world.shape, settings)
