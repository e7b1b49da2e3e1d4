"""An SDXL-shaped LoRA, written and read, and two of them compared to the bit."""

import flax.traverse_util
import numpy as np

from tlcm_jax.families.stable_diffusion import LORA_NAMES
from tlcm_jax.io import lora_export, lora_files

RANK = 3
TARGETS = (
    "to_q", "to_out.0", "proj_in", "net.0.proj", "conv1", "conv_shortcut", "time_emb_proj",
)  # fmt: skip
TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_out.0"


def read_lora(path, unet):
    return lora_files.read_lora(path, unet, LORA_NAMES)


def write_lora(path, adapter, **options):
    return lora_export.write_lora(path, adapter, LORA_NAMES, **options)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree)


def assert_equal(ours, expected):
    ours, expected = flat(ours), flat(expected)
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        assert ours[path].dtype == np.float32
        np.testing.assert_array_equal(ours[path], value, err_msg=str(path))
