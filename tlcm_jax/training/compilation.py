"""The persistent compilation cache that the commands share."""

import os

import jax

CACHE = os.path.join("~", ".cache", "tlcm_jax", "compiled")


def use_cache(folder: str = CACHE) -> None:
    """Keeps compiled programs in `folder` from process to process; empty keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
