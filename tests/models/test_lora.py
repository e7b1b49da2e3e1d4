"""An adapter merged into its base and the same adapter's factors beside it are one function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tlcm_jax.models import lora
from tlcm_jax.models.layers import Conv, Dense

TARGETS = ("conv1", "downsamplers.0.conv", "to_q")


class Network(nn.Module):
    """One adapted layer of each kind, and one that is not adapted."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(Conv(6, name="conv1")(x))
        x = nn.silu(Conv(8, strides=2, name="downsamplers.0.conv")(x))
        x = nn.silu(Dense(10, use_bias=False, name="to_q")(x))
        return Dense(3, name="to_k")(x)


def test_merged_and_factored_give_equal_outputs_and_gradients() -> None:
    network, scale = Network(), 0.75
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    base = network.init(jax.random.key(1), x)["params"]
    adapter = lora.init(base, TARGETS, 2, jax.random.key(2))
    # Away from the start, where B = 0 and A has no gradient.
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapter
    )

    def merged(adapter):
        return network.apply({"params": lora.merge(base, adapter, scale)}, x)

    def factored(adapter):
        return network.apply({"params": base, "lora": lora.scaled(adapter, scale)}, x)

    expected, pull_expected = jax.vjp(factored, adapter)
    actual, pull = jax.vjp(merged, adapter)
    assert _relative(network.apply({"params": base}, x), expected) > 1e-2  # it does something
    assert _relative(actual, expected) < 1e-6
    gradients, expected_gradients = pull(expected)[0], pull_expected(expected)[0]
    assert jax.tree.structure(gradients) == jax.tree.structure(adapter)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True)
    assert max(_relative(a, b) for a, b in pairs) < 1e-5


def _relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_every_layer_s_draw_is_its_own_key_s():
    shapes = {"conv1": (3, 3, 5, 8), "to_q": (7, 6)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    key = jax.random.key(5)
    adapter = lora.init(params, tuple(shapes), 3, key)
    for i, (name, fan_in) in enumerate({"conv1": 45, "to_q": 7}.items()):
        shape, bound = (*shapes[name][:-1], 3), fan_in**-0.5
        drawn = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
        np.testing.assert_array_equal(adapter[name]["lora_A"], drawn)
