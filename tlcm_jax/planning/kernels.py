"""What calls of our own kernels cost, which the compiler's text has no estimate for."""

import math

from tlcm_jax.planning.cycles import Kernel
from tlcm_jax.planning.topologies import Device

# The part of the peak that splash's schedule comes to on a v5e, for heads of 64: forward and back,
# each for keys in tiles of 2048 and of 1024 (`python -m benchmarks.attention_tiles`, which counts
# the instruction bundles of the compiled kernel; tiles x bundles bounds its cycles from above).
_PART = ((0.42, 0.34), (0.50, 0.49))
_UNIT = 128  # side of a v5e's matrix units


def seconds(kernel: Kernel, device: Device) -> float:
    """The time of all calls of a kernel.

    Other devices are taken to fill their matrix units as a v5e does; units of twice the side are
    filled half as well by heads of 64.

    Raises:
      ValueError: a kernel without a model.
    """
    if "splash" not in kernel.name:
        raise ValueError(f"no model for the time of the kernel {kernel.name!r}")
    back = "dkv" in kernel.name
    *heads, length, width = kernel.shape  # a batch of one is no axis of its own
    # Scores and values, 2 x MAC each; back, these again and the gradients of both factors of each.
    operations = (10 if back else 4) * math.prod(heads) * length**2 * width
    part = _PART[back][length < 2048] * _UNIT / device.matrix_unit
    return kernel.turns * operations / (part * device.peak)
