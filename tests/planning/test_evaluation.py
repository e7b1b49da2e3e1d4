"""What an evaluation takes, against the counts of its whole programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import emoji
from tlcm_jax.config.schema import read
from tlcm_jax.families.load import abstract_model
from tlcm_jax.planning import evaluation, report
from tlcm_jax.planning.cost import Compiler
from tlcm_jax.planning.evaluation import plan_evaluation
from tlcm_jax.planning.flops import count
from tlcm_jax.planning.programs import size
from tlcm_jax.planning.stage import Planner
from tlcm_jax.planning.topologies import read_topology


class Counting(Compiler):
    """A compiler to which a second is an operation, so that times are counts."""

    def forward(self, block, batch, like=None):
        cost = super().forward(block, batch, like)
        return dataclasses.replace(cost, seconds=float(cost.flops))


@pytest.fixture(scope="module")
def planner():
    settings = read(emoji.get_config("paper").to_dict())
    where = read_topology("h100:2")
    model = abstract_model(settings.model.path)
    return Planner(settings, model, where, Counting(device=where.device, dtype=jnp.float32))


def test_the_decoder_s_blocks_are_the_decoder(planner):
    model = planner.model
    latents = jax.ShapeDtypeStruct((3, *planner.latents.shape[1:]), jnp.float32)
    whole = count(model.decode_latents, {"vae": model.params["vae"]}, latents)
    seconds, most = evaluation._decoder(planner, 3)
    assert seconds == whole
    image = 3 * jnp.prod(jnp.array(model.image_size(None))) * 3 * 4
    assert most > image  # the last block holds more than the image


def test_an_evaluation_is_its_calls(planner):
    plan = plan_evaluation(planner, prompts=10, steps=4, batch=3)
    assert (plan.batch, plan.devices) == (4, 2)  # two a device
    assert plan.seconds["network"] == 4 * planner.network(2).seconds / 2
    assert plan.seconds.keys() >= {"decoder", "score clip", "score fid", "score image_reward"}
    # Three batches of four, two of each on a device.
    assert plan.hours == pytest.approx(3 * 2 * sum(plan.seconds.values()) / 3600)
    twice = plan_evaluation(planner, prompts=10, steps=8, batch=3)
    assert twice.seconds["network"] == 2 * plan.seconds["network"]
    assert plan.weights["network"] == size(planner.model.params["unet"])
    assert plan.peak == sum(plan.weights.values()) + max(plan.phases.values())
    # OpenCLIP's ViT-g/14 has 1.37 G parameters (open_clip's table), in fp32.
    assert plan.phases["scoring, the largest network"] == pytest.approx(4 * 1.3668e9, rel=1e-3)


def test_it_is_told_whether_it_fits(planner):
    plan = plan_evaluation(planner, prompts=100, steps=4, batch=8)
    said = report.describe_evaluation(plan, planner.topology, 3.0)
    assert "100 prompts at 4 steps, 8 images at a time" in said and "of 75: fits" in said
    huge = dataclasses.replace(plan, phases={"decoding": 10**12})
    said = report.describe_evaluation(huge, planner.topology, 0.0)
    assert "DOES NOT FIT" in said and "evaluate --batch_size 2 holds one image a device" in said
