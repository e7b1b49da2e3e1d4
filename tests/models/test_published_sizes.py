"""Parameter counts of SDXL's networks, as published, from shapes alone."""

import jax
import pytest

from tests.support.published import write_sdxl_configs
from tlcm_jax.families.load import abstract_model
from tlcm_jax.models import lora


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return abstract_model(write_sdxl_configs(tmp_path_factory.mktemp("sdxl")))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("component", "count"),
    [
        ("unet", 2_567_463_684),
        ("vae", 83_653_863),
        ("text_encoder", 123_060_480),
        ("text_encoder_2", 694_659_840),
    ],
)
def test_parameter_count(sdxl, component, count):
    assert size(sdxl.params[component]) == count


def test_lora_of_the_release(sdxl):
    adapter = jax.eval_shape(
        lambda params: lora.init(params, lora.TARGETS, 64, jax.random.key(0)), sdxl.params["unet"]
    )
    assert size(adapter) == 196_751_360  # 196.8 M at rank 64
