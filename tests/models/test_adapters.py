"""Adapters joined, and extracted from whole weights."""

import flax.traverse_util
import jax
import numpy as np
import pytest

from tlcm_jax.models import lora
from tlcm_jax.models.adapters import concat_loras, is_adapter, svd_extract

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


BASE = {
    "to_q": {"kernel": normal(12, 10)},
    "conv1": {"kernel": normal(3, 3, 4, 8), "bias": normal(8)},
    "conv_in": {"kernel": normal(3, 3, 2, 4)},
}


def adapter(rank):
    return {
        "to_q": {"lora_A": normal(12, rank), "lora_B": normal(rank, 10)},
        "conv1": {"lora_A": normal(3, 3, 4, rank), "lora_B": normal(1, 1, rank, 8)},
    }


def assert_close(ours, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, expected
    )


def test_extraction_of_a_low_rank_change_is_exact():
    trained = adapter(3)
    tuned = lora.merge(BASE, trained)
    found, missed = svd_extract(BASE, tuned, 3, ("to_q", "conv1"))
    assert missed < 1e-6
    assert_close(lora.merge(BASE, found), tuned)
    assert is_adapter(found) and not is_adapter(tuned)


def test_what_extraction_misses_is_the_discarded_spectrum_and_the_other_layers():
    tuned = jax.tree.map(lambda x: x + normal(*x.shape), BASE)
    found, missed = svd_extract(BASE, tuned, 4, ("to_q",))
    assert set(flax.traverse_util.flatten_dict(found)) == {("to_q", "lora_A"), ("to_q", "lora_B")}
    left = jax.tree.map(np.subtract, tuned, lora.merge(BASE, found))
    change = jax.tree.map(np.subtract, tuned, BASE)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))

    assert missed == pytest.approx(norm(left) / norm(change), rel=1e-5)
    better, less = svd_extract(BASE, tuned, 10, ("to_q", "conv1"))
    assert less < missed
    # 10 is more than the convolution's 8 outputs: exact there, and of the same rank as the rest.
    assert better["conv1"]["lora_A"].shape == (3, 3, 4, 10)
    np.testing.assert_allclose(
        lora.merge(BASE, better)["conv1"]["kernel"], tuned["conv1"]["kernel"], atol=2e-5
    )


def test_extraction_refuses():
    with pytest.raises(ValueError, match="equal the teacher's"):
        svd_extract(BASE, BASE, 2)
    with pytest.raises(ValueError, match="their names differ"):
        svd_extract(BASE, {"to_q": BASE["to_q"]}, 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        svd_extract(BASE, BASE, 0)


def test_combined_adds_updates():
    first, second = adapter(2), {"to_q": adapter(5)["to_q"]}
    both = concat_loras([first, second], [1.0, -0.5])
    assert both["to_q"]["lora_A"].shape == (12, 7)
    expected = lora.merge(lora.merge(BASE, first), second, -0.5)
    assert_close(lora.merge(BASE, both), expected)
    assert concat_loras([first], [1]) is first
    with pytest.raises(ValueError, match="1 adapters need as many weights, got 2"):
        concat_loras([first], [1, 2])
