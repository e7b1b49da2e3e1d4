import numpy as np
import pytest

from tlcm_jax.data.batches import whole_batches


@pytest.mark.parametrize(("count", "size", "number"), [(1, 4, 1), (8, 4, 2), (9, 4, 3), (0, 4, 0)])
def test_every_row_has_its_turn_in_batches_of_one_shape(count, size, number):
    batches = list(whole_batches(count, size))
    assert [batch.shape for batch in batches] == [(size,)] * number
    rows = np.concatenate([np.zeros(0, int), *batches])
    np.testing.assert_array_equal(rows[:count], np.arange(count))
    assert np.all(rows[count:] == count - 1)
