"""A UNet's tree of layers, small and without weights' meaning, and a tiny whole pipeline."""

import shutil

import jax
import numpy as np
import pytest

from tests.support.loras import RANK, TARGETS
from tests.support.tiny_pipeline import random_adapter, write_tiny_pipeline
from tlcm_jax.families.load import load_model
from tlcm_jax.models import lora


@pytest.fixture
def unet():
    """Layers of every shape that is adapted, under names with underscores and dots in them."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return {"kernel": rng.standard_normal(shape, np.float32)}

    attention = {"to_q": kernel(8, 8), "to_out.0": kernel(8, 8)}
    return {
        "down_blocks.0": {
            "resnets.0": {"conv1": kernel(3, 3, 4, 8), "time_emb_proj": kernel(16, 8)},
            "attentions.0": {
                "proj_in": kernel(8, 8),
                "transformer_blocks.1": {
                    "attn1": attention,
                    "ff": {"net.0": {"proj": kernel(8, 64)}},
                },
            },
        },
        "mid_block": {"resnets.0": {"conv_shortcut": kernel(1, 1, 4, 8)}},
    }


@pytest.fixture
def adapter(unet):
    """Random factors of the layers that `TARGETS` names."""
    shapes = jax.eval_shape(lambda key: lora.init(unet, TARGETS, RANK, key), jax.random.key(0))
    return random_adapter(shapes, np.random.default_rng(1))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def teacher(tiny):
    return load_model(tiny, on_device=False)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")
