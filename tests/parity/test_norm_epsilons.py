"""Group norms of flat images: 1e-5 in residual blocks and 1e-6 in transformers, as PyTorch has.

On inputs of variance 1e-6 one epsilon in the place of the other changes the output by tens of
percent; on inputs of unit variance no test could tell them apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the verify extra")
pytest.importorskip("diffusers", reason="needs the verify extra")

from diffusers.models.resnet import ResnetBlock2D as TorchResnet  # noqa: E402
from diffusers.models.transformers.transformer_2d import (  # noqa: E402
    Transformer2DModel as Torch2D,
)

from tests.support.tiny_pipeline import random_params  # noqa: E402
from tests.support.torch_networks import array, relative, tensor  # noqa: E402
from tlcm_jax.io import names  # noqa: E402
from tlcm_jax.models.resnet import ResnetBlock2D  # noqa: E402
from tlcm_jax.models.transformer import Transformer2DModel  # noqa: E402

X = 1e-3 * np.random.default_rng(0).standard_normal((2, 4, 4, 16), np.float32)
TIME = np.random.default_rng(1).standard_normal((2, 8), np.float32)
TEXT = np.random.default_rng(2).standard_normal((2, 5, 12), np.float32)


def twin(network, module, *inputs):
    """Random weights of `network` in both, found by its shapes on `inputs`."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    params = random_params(shapes, np.random.default_rng(3))
    tensors = {k: torch.from_numpy(v) for k, v in names.to_torch(params).items()}
    module.load_state_dict(tensors, strict=True)
    module.eval()
    return {"params": params}


def test_a_residual_block_has_1e_5():
    ours = ResnetBlock2D(16, groups=4)
    theirs = TorchResnet(in_channels=16, out_channels=16, temb_channels=8, groups=4, eps=1e-5)
    x, time = jnp.asarray(X), jnp.asarray(TIME)
    variables = twin(ours, theirs, x, time)
    with torch.no_grad():
        wanted = array(theirs(tensor(X, images=True), tensor(TIME)), images=True)
    assert relative(ours.apply(variables, x, time), wanted) < 1e-5
    theirs.norm1.eps = 1e-6
    with torch.no_grad():
        other = array(theirs(tensor(X, images=True), tensor(TIME)), images=True)
    assert relative(other, wanted) > 0.01  # the input can tell


def test_a_transformer_has_1e_6():
    ours = Transformer2DModel(layers=1, heads=2, head_dim=8, groups=4)
    theirs = Torch2D(
        2,
        8,
        in_channels=16,
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    x, text = jnp.asarray(X), jnp.asarray(TEXT)
    variables = twin(ours, theirs, x, text)
    with torch.no_grad():
        wanted = array(theirs(tensor(X, images=True), tensor(TEXT)).sample, images=True)
    assert relative(ours.apply(variables, x, text), wanted) < 1e-5
    theirs.norm.eps = 1e-5
    with torch.no_grad():
        other = array(theirs(tensor(X, images=True), tensor(TEXT)).sample, images=True)
    assert relative(other, wanted) > 0.01  # the input can tell
