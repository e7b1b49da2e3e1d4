"""A relative in the same code: trajectory segments (Hyper-SD, arXiv 2404.13686) on emoji-xl.

    python -m tlcm_jax.main --config configs/emoji_hyper_sd.py --workdir runs/emoji-hyper-sd

Jumps to any time between a point and its segment's end, with 8, 4, 2 and 1 segments in turn. The
states are the teacher's own paths; Hyper-SD takes them from noised pictures.
"""

from ml_collections import ConfigDict

from configs import emoji

SEGMENTS = (8, 4, 2, 1)


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("hyper_sd", variant, "segments")
    first = config.stages.segments
    guidance_scale = first.settings.guidance_scale
    stages = {}
    for segments in SEGMENTS:
        stage = stages[f"segments{segments}"] = ConfigDict(first.to_dict())
        # The steps of `emoji.py:paper`'s stage 1 are shared out; 16 points a path whatever M.
        stage.steps = max(1, first.steps // len(SEGMENTS))
        stage.warmup_steps = first.warmup_steps if segments == SEGMENTS[0] else 0
        stage.settings = ConfigDict(
            dict(
                segments=segments,
                points_per_segment=16 // segments,
                guidance_scale=guidance_scale,
                target_time="uniform",
            )
        )
    config.stages = ConfigDict(stages)
    config.stage_order = tuple(stages)
    return config
