"""Accelerators by their published figures, and topologies of them by name, such as `v5e:4x4`.

Peaks, memory and bandwidths are the vendors' own, for dense bf16. A chip is what is rented; a
device is what JAX sees (a TPU7x has two a chip, a v4's two cores make one, as "megacore").
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device, as JAX counts them.

    Attributes:
      name: of the accelerator.
      peak: bf16 FLOP/s.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      link: bytes/s that it sends to its neighbours, all links together.
      flops_per_cycle: of its matrix units; `peak` over it is the clock that turns the compiler's
        cycles into seconds. 0 where no compiler for it is at hand.
      matrix_unit: their side.
      smallest: its smallest topology, by libtpu's name.
      per_chip: devices of a chip.
      dimensions: of its topologies' names: 2 or 3 on a TPU, 1 elsewhere.
    """

    name: str
    peak: float
    memory: int
    bandwidth: float
    link: float
    flops_per_cycle: int = 0
    matrix_unit: int = 128
    smallest: str = ""
    per_chip: int = 1
    dimensions: int = 1

    @property
    def compiled(self) -> bool:
        """Whether programs are compiled for it; else its times are rooflines."""
        return bool(self.smallest)

    def roofline(self, flops: float, moved: float) -> float:
        """The least seconds for so many operations, and bytes across the memory."""
        return max(flops / self.peak, moved / self.bandwidth)

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak / self.flops_per_cycle


_CORE = 4 * 128 * 128 * 2  # a TensorCore's four matrix units of 128 x 128, up to v5p
_CORE_6 = 2 * 256 * 256 * 2 * 2  # two of 256 x 256 from v6e on, at two products a cycle
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="v4", peak=275e12, memory=32 * GIB, bandwidth=1.2e12, link=300e9,
            flops_per_cycle=2 * _CORE, smallest="v4:2x2x1", dimensions=3,
        ),
        Device(
            name="v5e", peak=197e12, memory=16 * GIB, bandwidth=0.81e12, link=200e9,
            flops_per_cycle=_CORE, smallest="v5e:1x1", dimensions=2,
        ),
        Device(
            name="v5p", peak=459e12, memory=95 * GIB, bandwidth=2.765e12, link=600e9,
            flops_per_cycle=2 * _CORE, smallest="v5p:2x2x1", dimensions=3,
        ),
        Device(
            name="v6e", peak=918e12, memory=32 * GIB, bandwidth=1.64e12, link=448e9,
            flops_per_cycle=_CORE_6, matrix_unit=256, smallest="v6e:1x1", dimensions=2,
        ),
        Device(
            name="tpu7x", peak=1153e12, memory=96 * GIB, bandwidth=3.69e12, link=600e9,
            flops_per_cycle=_CORE_6, matrix_unit=256, smallest="tpu7x:2x2x1", per_chip=2,
            dimensions=3,
        ),
        Device(name="h100", peak=989e12, memory=80 * 10**9, bandwidth=3.35e12, link=450e9),
        Device(name="h200", peak=989e12, memory=141 * 10**9, bandwidth=4.8e12, link=450e9),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """So many chips of one kind.

    Attributes:
      name: as it was asked for.
      device: each of them.
      chips: of all hosts.
    """

    name: str
    device: Device
    chips: int

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.device.per_chip


def read_topology(name: str) -> Topology:
    """A topology by its name, `KIND:SIZE`; the size of a GPU's is a number, 1 by default.

    Raises:
      ValueError: an unknown kind, or a size that its kind cannot have; the known are listed.
    """
    kind, _, size = name.lower().partition(":")
    device = DEVICES.get(kind)
    example = ", ".join(
        f"{known}:{'x'.join('4' * d.dimensions)}" if d.dimensions > 1 else f"{known}:8"
        for known, d in DEVICES.items()
    )
    if device is None:
        raise ValueError(f"topology {name!r}: unknown kind {kind!r}; known, for example: {example}")
    if not size and device.dimensions == 1:
        size = "1"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(f"topology {name!r}: no size; write it like one of {example}")
    sides = [int(side) for side in size.split("x")]
    if len(sides) != device.dimensions:
        raise ValueError(
            f"topology {name!r}: a {kind} has {device.dimensions} dimension(s); write it like one "
            f"of {example}"
        )
    return Topology(name=name, device=device, chips=math.prod(sides))
