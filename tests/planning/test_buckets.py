"""The plan of several sizes of images: an average step's time, the largest one's memory."""

from tlcm_jax.planning.buckets import mixed
from tlcm_jax.planning.stage import StagePlan


def plan(memory, seconds, sent):
    return StagePlan(
        name="only", steps=4, pairs=8, batch=2, memory={"weights": 10, "temporaries": memory},
        seconds={"student": seconds}, flops=10 * seconds, collectives={"gradients summed": sent},
        notes=("not in it: the term x",),
    )  # fmt: skip


def test_times_are_means_by_share_and_the_memory_is_the_largest_s():
    small, large = plan(5, 1.0, 100), plan(9, 3.0, 100)
    found = mixed([("512x512", 0.75, small), ("1024x1024", 0.25, large)])
    assert found.peak == 19 and found.step_seconds == 1.5 and found.flops == 15
    assert found.collectives == {"gradients summed": 100}
    assert found.notes[0] == large.notes[0] and "that of 1024x1024" in found.notes[1]
    assert mixed([("512x512", 1.0, small)]) is small
