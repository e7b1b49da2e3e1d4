"""A relative in the same code: latent consistency distillation (LCM, arXiv 2310.04378) on emoji-xl.

    python -m tlcm_jax.main --config configs/emoji_lcm.py --workdir runs/emoji-lcm

One segment: every point of a trajectory is to jump to its end, by LCM's pseudo-Huber distance. The
states are the teacher's own paths, as in the default recipe; LCM takes them from noised pictures.
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("lcm", variant, "segments")
    # As many points a path as the 8 segments of 2 of `emoji.py:paper`, and so as many evaluations.
    settings = config.stages.segments.settings
    settings.segments, settings.points_per_segment, settings.huber = 1, 16, 1e-3
    return config
