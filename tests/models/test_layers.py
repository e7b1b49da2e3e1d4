"""The layers against XLA's own operations, and in bf16 against one rounding of the exact sum."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tlcm_jax.models.layers import Conv, Dense, GroupNorm, group_norm

BF16 = ml_dtypes.bfloat16
# XLA may else keep a rounded product in fp32, and one rounding looks like two.
EXACT = {"xla_allow_excess_precision": False}


@pytest.mark.parametrize(
    "shape, strides, padding",
    [
        ((1, 1), 1, 1),
        ((1, 1), 2, 1),
        ((1, 2), 1, 1),
        ((1, 2), 1, 2),
        ((2, 2), 1, 1),
        ((2, 2), 2, 1),
        ((2, 2), 2, ((0, 1), (0, 1))),
        ((5, 8), 1, 1),
        ((8, 7), 2, 1),
    ],
)
def test_small_images(shape, strides, padding) -> None:
    layer = Conv(5, strides=strides, padding=padding)
    x = jax.random.normal(jax.random.key(0), (3, *shape, 4))
    sides = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    variables = layer.init(jax.random.key(1), x)

    def reference(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (strides,) * 2, sides, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    kernel = variables["params"]["kernel"]
    expected, pull_expected = jax.vjp(reference, kernel, x)
    actual, pull = jax.vjp(
        lambda kernel, x: layer.apply({"params": {**variables["params"], "kernel": kernel}}, x),
        kernel,
        x,
    )
    assert actual.shape == expected.shape
    for a, b in [
        (actual, expected),
        *zip(pull(expected), pull_expected(expected), strict=True),
    ]:
        assert jnp.linalg.norm(a - b) < 1e-6 * jnp.linalg.norm(b)


def exact(layer, x, variables):
    """The layer's sum in float64, from what bf16 makes of its inputs; unrounded."""

    def product(x, kernel):
        x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
        if kernel.ndim == 2:
            return x @ kernel
        size, pad = kernel.shape[0], (kernel.shape[0] - 1) // 2
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        height, width = x.shape[1:3]
        return sum(
            padded[:, i : i + height, j : j + width] @ kernel[i, j]
            for i in range(size)
            for j in range(size)
        )

    x = np.asarray(x).astype(BF16)
    read = {name: np.asarray(leaf).astype(BF16) for name, leaf in variables["lora"].items()}
    update = product(product(x, read["lora_A"]).astype(BF16), read["lora_B"])
    params = variables["params"]
    return product(x, np.asarray(params["kernel"]).astype(BF16)) + update + params["bias"]


@pytest.mark.parametrize(
    ("layer", "shape", "factors"),
    [
        (Dense(96, dtype=jnp.bfloat16), (64, 48), ((48, 4), (4, 96))),
        (Conv(64, dtype=jnp.bfloat16), (2, 8, 8, 24), ((3, 3, 24, 4), (1, 1, 4, 64))),
        (Conv(64, dtype=jnp.bfloat16), (1, 12, 12, 24), ((3, 3, 24, 4), (1, 1, 4, 64))),
    ],
    ids=["dense", "conv of patches", "conv"],
)
def test_bf16_is_rounded_once(layer, shape, factors) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], shape)
    params = layer.init(keys[1], x)["params"]
    params = {**params, "bias": jax.random.normal(keys[2], params["bias"].shape)}
    factors = [0.3 * jax.random.normal(k, s) for k, s in zip(keys[3:], factors, strict=True)]
    variables = {"params": params, "lora": dict(zip(("lora_A", "lora_B"), factors, strict=True))}
    output = jax.jit(layer.apply, compiler_options=EXACT)(variables, x)
    assert output.dtype == jnp.bfloat16
    unequal = np.mean(np.asarray(output) != exact(layer, x, variables).astype(BF16))
    # What fp32 adds in another order, and what lies on an edge between the update's factors; a
    # rounded product makes a third unequal.
    assert unequal < 0.01


@pytest.mark.parametrize("layer", [Dense(6), Conv(6)], ids=["dense", "conv"])
def test_gradients_of_bf16_are_those_of_its_own_product(layer) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 5))
    variables = layer.init(jax.random.key(1), x)
    cotangent = jax.random.normal(jax.random.key(2), layer.apply(variables, x).shape)

    def gradients(dtype):
        def forward(variables, x):
            return layer.clone(dtype=dtype).apply(variables, x).astype(jnp.float32)

        return jax.vjp(forward, variables, x)[1](cotangent)

    for ours, expected in zip(
        jax.tree.leaves(gradients(jnp.bfloat16)),
        jax.tree.leaves(gradients(jnp.float32)),
        strict=True,
    ):
        assert ours.dtype == expected.dtype
        assert jnp.linalg.norm(ours - expected) < 1e-2 * jnp.linalg.norm(expected)


def norms(x):
    """Of an image `[b, h, w, c]`: in float64, by one pass, and by Flax's two; unscaled."""
    groups = x.astype(np.float64).reshape(x.shape[0], -1, 32, x.shape[-1] // 32)
    mean = groups.mean((1, 3), keepdims=True)
    exact = (groups - mean) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    one, two = GroupNorm(32, 1e-5, jnp.float32), group_norm(32, 1e-5, jnp.float32, None)
    assert isinstance(two, nn.GroupNorm)
    variables = one.init(jax.random.key(0), x)
    return exact.reshape(x.shape), one.apply(variables, x), two.apply(variables, x)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_one_pass_over_a_group_is_as_sound_as_two(offset):
    x = np.random.default_rng(0).standard_normal((2, 9, 7, 64)).astype(np.float32) + offset
    exact, one, two = norms(x)
    assert relative(one, exact) <= max(1e-6, relative(two, exact))


def test_one_pass_has_the_gradients_of_two():
    x = np.random.default_rng(1).standard_normal((2, 5, 6, 64)).astype(np.float32) + 1
    wanted = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    one, two = GroupNorm(32, 1e-5, jnp.float32), group_norm(32, 1e-5, jnp.float32, None)
    variables = one.init(jax.random.key(0), x)

    def gradients(norm):
        return jax.grad(lambda v, x: jnp.sum(norm.apply(v, x) * wanted), (0, 1))(variables, x)

    for a, b in zip(*map(jax.tree.leaves, map(gradients, (one, two))), strict=True):
        assert relative(a, b) < 1e-5


def test_in_bf16_the_norm_is_rounded_once():
    x = np.random.default_rng(3).standard_normal((1, 8, 8, 64)).astype(BF16)
    norm = group_norm(32, 1e-5, jnp.bfloat16, None)
    exact, _, _ = norms(x.astype(np.float32))
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=2**-8)
