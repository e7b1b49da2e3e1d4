"""The layers against XLA's own operations."""

import jax
import jax.numpy as jnp
import pytest

from tlcm_jax.models.layers import Conv


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
