"""A relative in the same code: distribution matching alone (DMD2, arXiv 2405.14867) on emoji-xl.

    python -m tlcm_jax.main --config configs/emoji_dmd2.py --workdir runs/emoji-dmd2

Four steps, 999 749 499 249, whose states are the student's own rollouts; the score's difference
and an adversarial term, 5 updates of the auxiliary networks to 1. DMD2's discriminator sees real
pictures; here the student's own four-step samples stand in for them.
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("dmd2", variant, "endpoints")
    stage = config.stages.endpoints
    guidance_scale = stage.settings.guidance_scale
    # No consistency loss, and so no walk of the teacher's.
    stage.settings = ConfigDict(dict(segments=4, states_per_rollout=4, weight=0.0))
    stage.terms = ConfigDict(
        dict(
            distribution_matching=dict(guidance_scale=guidance_scale, aux_learning_rate=3e-4),
            adversarial=dict(weight=5e-3, aux_learning_rate=1e-3),
        )
    )
    return config
