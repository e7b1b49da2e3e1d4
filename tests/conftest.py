"""Eight simulated CPU devices for every test, and run-time shape checks of the pure rooms."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook  # noqa: E402

# Kept alive for the whole session: shapes in signatures are checked on every call.
_hook = install_import_hook(["tlcm_jax.diffusion", "tlcm_jax.distillation"], "beartype.beartype")
