"""A relative in the same code: stochastic consistency (SCott, arXiv 2403.01505) on emoji-xl.

    python -m miniature.encode_latents --data emoji32.npz --model miniature/emoji-xl \\
        --output miniature/latents.npz
    python -m tlcm_jax.main --config configs/emoji_scott.py --workdir runs/emoji-scott

Real latents, noised; the teacher goes 24 times down in three stochastic steps; the target is the
student's EMA; and predictions are held against the pictures by a discriminator, weight 0.4.
The distance is SCott's, pseudo-Huber.
"""

from ml_collections import ConfigDict

from configs import emoji
from tlcm_jax import paths


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("scott", variant, "segments")
    config.latents = str(paths.MINIATURE / "latents.npz")
    stage = config.stages.segments
    # A pair a picture, at three times the evaluations of one of `emoji.py:paper`.
    stage.prompts_per_refill, stage.steps = 272, stage.steps // 3
    stage.ema_decay = 0.95
    guidance_scale = stage.settings.guidance_scale
    stage.settings = ConfigDict(
        dict(
            mode="data",
            segments=1,
            skip=24,
            teacher_substeps=3,
            solver="sde",
            loss_space="x0",
            huber=1e-3,
            target="ema",
            guidance_scale=guidance_scale,
        )
    )
    stage.terms = ConfigDict(
        dict(adversarial=dict(weight=0.4, aux_updates=1, aux_learning_rate=1e-3))
    )
    return config
