import pytest

from tlcm_jax.planning.topologies import DEVICES, read_topology


def test_sizes():
    assert read_topology("v5e:4x4").devices == 16
    assert read_topology("v5p:2x2x4").chips == 16
    # Two devices a chip.
    assert (read_topology("TPU7x:2x2x1").chips, read_topology("tpu7x:2x2x1").devices) == (4, 8)
    assert read_topology("h100").devices == 1
    assert read_topology("h200:8").devices == 8


def test_clocks_are_those_of_the_chips():
    clocks = {name: device.clock / 1e9 for name, device in DEVICES.items() if device.compiled}
    assert {name: round(clock, 2) for name, clock in clocks.items()} == {
        "v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v9:2x2", "unknown kind 'v9'; known, for example: v4:4x4x4, v5e:4x4"),
        ("v5e", "no size"),
        ("v5e:4x", "no size"),
        ("v5e:2x2x2", "2 dimension"),
        ("v5p:8", "3 dimension"),
    ],
)
def test_what_there_is_not_is_told(name, told):
    with pytest.raises(ValueError, match=told):
        read_topology(name)
