"""What the commands share of compilation: the persistent cache, and a TPU compiler's options."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

CACHE = os.path.join("~", ".cache", "tlcm_jax", "compiled")
# For programs without gradients. A TPU's compiler turns convolutions of small batches into others
# of larger ones, which cost more (docs/scale.md). Either option alone does nothing; with gradients
# a single block then compiles for minutes.
TPU_FORWARD: Mapping[str, Any] = {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
}


def use_cache(folder: str = CACHE) -> None:
    """Keeps compiled programs in `folder` from process to process; empty keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def forward_options(mesh: Mesh | None) -> dict[str, Any]:
    """Options for `jax.jit`'s `compiler_options` of a program without gradients.

    Args:
      mesh: what it runs on; None for the default device.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return dict(TPU_FORWARD) if device.platform == "tpu" else {}
