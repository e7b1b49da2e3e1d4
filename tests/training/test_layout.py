"""Mesh and sharding rules: sizes, errors before compiling, and where leaves land."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tlcm_jax.training import mesh as meshes
from tlcm_jax.training import sharding


def test_free_axis_takes_what_is_left():
    assert dict(meshes.make_mesh({"data": -1, "fsdp": 2}).shape) == {"data": 4, "fsdp": 2}
    assert dict(meshes.make_mesh({"fsdp": -1}).shape) == {"data": 1, "fsdp": 8}
    one = meshes.make_mesh({"data": -1}, jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3, "fsdp": 2}, "data=3, fsdp=2 does not fit 8 devices.*set data=-1"),
        ({"data": -1, "fsdp": 3}, "data=-1, fsdp=3 does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
        ({"model": 2}, r"unknown mesh axis \['model'\].*'data', 'fsdp'"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(axes)


def test_batches_are_split_or_refused():
    on = meshes.make_mesh({"data": 2, "fsdp": 4})
    batch = meshes.shard_batch(on, {"conditioning": np.arange(32.0).reshape(16, 2)})
    assert batch["conditioning"].addressable_shards[3].data.shape == (2, 2)
    with pytest.raises(ValueError, match=r"batch size is 12, which the 8 devices .*8 or 16"):
        meshes.check_batch(on, 12)
    with pytest.raises(ValueError, match=r"is 3, .*set it to 8,"):
        meshes.shard_batch(on, np.zeros((3, 2)))
    meshes.check_batch(None, 13)


def test_fsdp_splits_the_largest_divisible_axis_of_large_arrays():
    on = meshes.make_mesh({"data": 2, "fsdp": 4})
    rule = sharding.fsdp(min_size=64)
    assert rule((3, 3, 8, 16), on) == P(None, None, None, "fsdp")
    assert rule((3, 3, 16, 6), on) == P(None, None, "fsdp")
    assert rule((16, 16), on) == P(None, "fsdp")
    assert rule((15, 15), on) == P()  # nothing divides
    assert rule((8, 4), on) == P()  # too small
    assert rule((), on) == P()
    assert rule((64, 64), meshes.make_mesh({"data": 8})) == P()


def test_the_first_matching_rule_decides():
    on = meshes.make_mesh({"fsdp": 8})
    tree = {"down.0": {"norm": jnp.ones((8, 8)), "kernel": jnp.ones((8, 8))}}
    rules = ((r"down\.0/norm$", sharding.replicate), (r"kernel", sharding.fsdp(0)))
    placed = sharding.place(tree, on, rules)["down.0"]
    assert placed["norm"].sharding.spec == P() and placed["kernel"].sharding.spec[-1] == "fsdp"
    with pytest.raises(ValueError, match="no sharding rule matches 'down.0/norm'"):
        sharding.tree_shardings(tree, on, rules[1:])
