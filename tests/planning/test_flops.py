import jax
import jax.numpy as jnp
import pytest

from benchmarks.flops import unet_forward
from tests.support.published import UNET
from tlcm_jax.models.attention import attention
from tlcm_jax.models.layers import Conv, Dense
from tlcm_jax.models.unet_config import UNetConfig
from tlcm_jax.planning.flops import count


def test_products_convolutions_and_attention():
    x = jnp.zeros((2, 10, 3, 8))
    assert count(lambda a, b: a @ b, jnp.zeros((5, 7)), jnp.zeros((7, 3))) == 2 * 5 * 7 * 3
    # Scores and values: 2 x MAC of n m d, each, in every head and sample.
    assert count(attention, x, x[:, :4], x[:, :4]) == 2 * (2 * 3) * 2 * (10 * 4 * 8)
    conv = Conv(16, strides=2)
    image = jnp.zeros((2, 9, 12, 4))
    variables = jax.eval_shape(conv.init, jax.random.key(0), image)
    assert count(conv.apply, variables, image) == 2 * (2 * 5 * 6 * 16) * (9 * 4)


def test_loops():
    a = jnp.zeros((4, 4))
    turns = lambda a: jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, a), None), a, length=6)[0]  # noqa: E731
    assert count(turns, a) == 6 * 2 * 4**3
    assert count(jax.checkpoint(lambda a: a @ a), a) == 2 * 4**3
    with pytest.raises(ValueError, match="while loop"):
        count(lambda a: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ a, a), a)


def test_what_nobody_reads_is_not_counted():
    x = jnp.zeros((4, 4), jnp.bfloat16)
    layer = Dense(4, use_bias=False, dtype=jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def gradient(variables, x):
        return jax.grad(lambda x: jnp.sum(layer.apply(variables, x)))(x)

    # The gradient of the input alone, not that of the weights beside it.
    assert count(gradient, variables, x) == 2 * 4**3


def test_sdxl_at_1024_px():
    assert round(unet_forward(UNetConfig.from_dict(UNET), 1024) / 1e12, 3) == 6.761
