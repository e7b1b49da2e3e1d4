"""Eight simulated CPU devices for every test, and run-time shape checks of the pure rooms."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation of programs that run a few times on tiny arrays: without
# LLVM's optimisation it takes 0.7 of the CPU time. Flags that the caller gives come last, and win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

from jaxtyping import install_import_hook  # noqa: E402

# Kept alive for the whole session: shapes in signatures are checked on every call.
_PACKAGES = ("diffusion", "distillation", "families", "generation")
_MODELS = (
    "attention", "clip_text", "discriminator", "embeddings", "latent_lpips", "resnet",
    "transformer", "unet", "unet_blocks", "vae",
)  # fmt: skip
_hook = install_import_hook(
    [*(f"tlcm_jax.{p}" for p in _PACKAGES), *(f"tlcm_jax.models.{m}" for m in _MODELS)],
    "typecheck.typecheck",
)
