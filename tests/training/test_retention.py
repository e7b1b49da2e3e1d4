"""Which checkpoints stay."""

import pytest

from tlcm_jax.training.retention import Keep, Record, metric_of, surplus

RECORDS = [
    Record(total=total, stage_end=total in (4, 9), metric=metric)
    for total, metric in [(2, 0.1), (4, 0.9), (5, None), (6, 0.5), (8, 0.9), (9, 0.3), (10, 0.2)]
]


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(last=1), {10}),
        (Keep(last=3), {8, 9, 10}),
        (Keep(last=1, every=4), {4, 8, 10}),
        (Keep(last=1, stage_ends=True), {4, 9, 10}),
        (Keep(last=1, best="loss"), {2, 10}),
        (Keep(last=1, best="-reward"), {8, 10}),  # of equals the newest
        (Keep(last=99), {2, 4, 5, 6, 8, 9, 10}),
    ],
)
def test_what_stays(keep, stay):
    assert set(surplus(RECORDS, keep)) == {record.total for record in RECORDS} - stay


def test_a_metric_that_is_none_of_the_row_decides_nothing():
    row = {"loss": 2, "bad": float("nan"), "text": "x"}
    assert metric_of(row, Keep(best="-loss")) == 2.0
    assert [metric_of(row, Keep(best=name)) for name in ("bad", "text", "other", "")] == [None] * 4
    with pytest.raises(ValueError, match="keep at least the last"):
        Keep(last=0)
