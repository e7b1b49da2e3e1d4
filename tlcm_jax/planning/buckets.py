"""The plan of a recipe that trains on images of several sizes: that of each size, and their mix."""

import dataclasses
from collections.abc import Mapping, Sequence

from tlcm_jax.config.schema import Settings
from tlcm_jax.families.base import LatentModel
from tlcm_jax.planning.cost import Compiler
from tlcm_jax.planning.evaluation import EvaluationPlan, plan_evaluation
from tlcm_jax.planning.stage import Planner, StagePlan
from tlcm_jax.planning.topologies import Topology


class Plans:
    """Plans the stages of a recipe, whose images are of one size or of several.

    Attributes:
      settings: the recipe.
      topology: what it is to run on.
      mesh: the sizes of its axes.
    """

    def __init__(
        self,
        settings: Settings,
        model: LatentModel,
        topology: Topology,
        compiler: Compiler,
        every_block: bool = False,
    ):
        """Traces the network once a size; arguments and errors are `Planner`'s."""
        self.settings, self.topology = settings, topology
        buckets = settings.model.size_buckets or ((settings.model.size, 1.0),)
        total = sum(weight for _, weight in buckets)
        self._planners = []
        for size, weight in buckets:
            of_size = dataclasses.replace(
                settings.model, resolution=str(size) if size else 0, buckets={}
            )
            recipe = dataclasses.replace(settings, model=of_size)
            one = Planner(recipe, model, topology, compiler, every_block)
            self._planners.append((str(size), weight / total, one))
        self.mesh: Mapping[str, int] = self._planners[0][2].mesh.shape

    def evaluation(self, prompts: int, steps: int, batch: int) -> EvaluationPlan:
        """Of images of the first size; args are `plan_evaluation`'s."""
        return plan_evaluation(self._planners[0][2], prompts, steps, batch)

    def plan(self, name: str) -> StagePlan:
        """One stage; errors are `Planner.plan`'s."""
        return mixed([(size, share, one.plan(name)) for size, share, one in self._planners])


def mixed(plans: Sequence[tuple[str, float, StagePlan]]) -> StagePlan:
    """Times, operations and traffic of an average step; the memory of the size that needs most.

    Args:
      plans: of one stage: the size, its share of the steps, and the plan.
    """
    if len(plans) == 1:
        return plans[0][2]
    size, _, largest = max(plans, key=lambda each: each[2].peak)

    def mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        shares = [share for _, share, _ in plans]
        return {
            what: sum(share * of[what] for share, of in zip(shares, values, strict=True))
            for what in values[0]
        }

    return dataclasses.replace(
        largest,
        seconds=mean([plan.seconds for _, _, plan in plans]),
        flops=sum(share * plan.flops for _, share, plan in plans),
        collectives={
            what: int(sent)
            for what, sent in mean([plan.collectives for _, _, plan in plans]).items()
        },
        notes=(
            *largest.notes,
            f"images of {len(plans)} sizes: times are an average step's, the memory is that of "
            f"{size}; each size is compiled by itself",
        ),
    )
