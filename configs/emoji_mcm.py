"""A relative in the same code: multistep consistency (MCM, arXiv 2403.06807) on emoji-xl.

    python -m miniature.encode_latents --data emoji32.npz --model miniature/emoji-xl \\
        --output miniature/latents.npz
    python -m tlcm_jax.main --config configs/emoji_mcm.py --workdir runs/emoji-mcm
    python -m tlcm_jax.sample --model runs/emoji-mcm --steps 8 --prompt "a rocket"

Real latents, noised, in place of the teacher's paths; one time down by adjusted DDIM; compared as
x0 with MCM's weight. MCM is sampled without fresh noise (gamma 0), at its segments' own times:
with 8 segments, in 8 steps.
"""

from ml_collections import ConfigDict

from configs import emoji
from tlcm_jax import paths


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("mcm", variant, "segments")
    config.latents = str(paths.MINIATURE / "latents.npz")
    config.evaluation.gamma = 0.0
    stage = config.stages.segments
    # A pair a picture: as many as 16 prompts' paths have, at the same evaluations a pair.
    stage.prompts_per_refill = 272
    guidance_scale = stage.settings.guidance_scale
    stage.settings = ConfigDict(
        dict(
            mode="data",
            segments=8,
            skip=1,
            solver="addim",
            loss_space="x0",
            snr_limit=5.0,
            guidance_scale=guidance_scale,
        )
    )
    return config
