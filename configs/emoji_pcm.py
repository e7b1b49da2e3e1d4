"""A relative in the same code: phased consistency (PCM, arXiv 2405.18407) on emoji-xl.

    python -m tlcm_jax.main --config configs/emoji_pcm.py --workdir runs/emoji-pcm

Four phases, and inside each an adversarial term between the jump and its target, weight 0.1. The
states are the teacher's own paths; PCM takes them from noised pictures.
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("pcm", variant, "segments")
    stage = config.stages.segments
    guidance_scale = stage.settings.guidance_scale
    stage.settings = ConfigDict(
        dict(segments=4, points_per_segment=4, guidance_scale=guidance_scale)
    )
    stage.terms = ConfigDict(
        dict(
            # Compared within the phase: t' from the lower milestone to the next one up.
            adversarial=dict(
                weight=0.1, real="target", times=(0, 62, 125, 187, 249), aux_updates=1
            ),
        )
    )
    return config
