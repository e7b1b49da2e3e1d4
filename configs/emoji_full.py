"""All of TLCM on emoji-xl: progressive segments, endpoints, preference, then DM and adversarial.

    python -m tlcm_jax.main --config configs/emoji_full.py --workdir runs/emoji-full

The stages and terms are the paper's (arXiv 2406.05768); batches, steps and rates are scaled down
with those of `configs/emoji.py`.
"""

from ml_collections import ConfigDict

from configs import emoji
from tlcm_jax import paths

SEGMENTS = (8, 4, 2)


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; there are no variants."""
    config = emoji.relative("full", variant, "segments", "endpoints")
    look = dict(latent_lpips=dict(weights=str(paths.MINIATURE / "latent_lpips")))
    guidance_scale = config.stages.segments.settings.guidance_scale
    first, second = config.stages.segments.to_dict(), config.stages.endpoints.to_dict()
    stages = {}
    for segments in SEGMENTS:
        # 16 nodes a path whatever M; the steps of the default's first stage are shared out.
        settings = dict(
            segments=segments, nodes_per_segment=16 // segments, guidance_scale=guidance_scale
        )
        steps = max(1, first["steps"] // len(SEGMENTS))
        stages[f"segments{segments}"] = dict(first, steps=steps, settings=settings, terms=look)
    stages["endpoints"] = dict(second, terms=look)
    later = dict(second, learning_rate=1e-4, decay="constant", steps=20)
    scorer = dict(scorer="contrastive", weights=str(paths.MINIATURE / "scorer"))
    stages["preference"] = dict(later, terms=dict(look, preference=scorer))
    stages["matching"] = dict(
        later,
        terms=dict(
            look,
            distribution_matching=dict(guidance_scale=guidance_scale, critic_learning_rate=1e-4),
            adversarial=dict(weight=5e-3, critic_learning_rate=1e-3),
        ),
    )
    config.stages = ConfigDict(stages)
    config.stage_order = tuple(stages)
    return config
