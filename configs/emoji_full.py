"""All of TLCM on emoji-xl: every term of the paper, on our two stages or on its own.

    python -m tlcm_jax.main --config configs/emoji_full.py --workdir runs/emoji-full
    python -m tlcm_jax.main --config configs/emoji_full.py:paper --workdir runs/emoji-full-paper

Without a variant the stages are the default's (`configs/emoji.py`) with latent LPIPS beside them,
preference beside the second too, and a third with distribution matching and the adversarial term.
`:paper` has the paper's (arXiv 2406.05768): progressive segments, endpoints, preference, then
matching and adversarial. Batches, steps and rates are scaled down with those of
`configs/emoji.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import emoji
from tlcm_jax import paths

SEGMENTS = (8, 4, 2)


def get_config(variant: str = "") -> ConfigDict:
    """The recipe, or its variant `paper`."""
    if variant not in ("", "paper"):
        raise ValueError(f"configs/emoji_full.py has no variant {variant!r}; use ':paper'")
    config = emoji.get_config(variant)
    config.name = "emoji-xl-full"
    stages = _paper_stages(config) if variant else _our_stages(config)
    config.stages = ConfigDict(stages)
    config.stage_order = tuple(stages)
    return config


def _our_stages(config: ConfigDict) -> dict[str, Any]:
    # At weight 1 its gradient is 4 to 10 times the mean square's, at 0.1 as large: that costs 2 and
    # 3 steps more than it gives 4 and 8.
    look = emoji.latent_lpips(weight=0.02)
    # Its gradient is as large as the jumps'; at five times that, in one run, 1 step gained and the
    # Frechet distance at 3 to 8 steps grew.
    # The scorer's own threshold is the mean of real pictures, which the teacher's pass already.
    scorers = dict(contrastive=dict(_scorer(), threshold=100.0))
    liked = dict(look, preference=dict(scorers=scorers, weight=10.0, max_grad_ratio=1.0))
    first, second = config.stages.to_dict().values()
    last = _last_terms(config)
    # At weight 1 fifty times the jumps' gradient, which the teacher's targets hold in place.
    last["distribution_matching"]["weight"] = 0.01
    last["adversarial"] |= dict(real="target", weight=2e-3)
    matching = dict(
        second,
        learning_rate=1e-4,
        decay="constant",
        warmup_steps=0,
        steps=8,
        # The paths of 4 prompts make 68 pairs: 2 updates of 34.
        batch_size=34,
        prompts_per_refill=4,
        terms=dict(liked, **last),
    )
    return dict(
        segments4=dict(first, terms=look), segments2=dict(second, terms=liked), matching=matching
    )


def _paper_stages(config: ConfigDict) -> dict[str, Any]:
    look = emoji.latent_lpips()
    guidance_scale = config.stages.segments.settings.guidance_scale
    first, second = config.stages.segments.to_dict(), config.stages.endpoints.to_dict()
    stages = {}
    for segments in SEGMENTS:
        # 16 points a path whatever M; the steps of the first stage are shared out.
        settings = dict(
            segments=segments, points_per_segment=16 // segments, guidance_scale=guidance_scale
        )
        steps = max(1, first["steps"] // len(SEGMENTS))
        stages[f"segments{segments}"] = dict(first, steps=steps, settings=settings, terms=look)
    stages["endpoints"] = dict(second, terms=look)
    later = dict(second, learning_rate=1e-4, decay="constant", steps=40)
    preference = dict(scorers=dict(contrastive=_scorer()))
    stages["preference"] = dict(later, terms=dict(look, preference=preference))
    stages["matching"] = dict(later, terms=dict(look, **_last_terms(config)))
    return stages


def _scorer() -> dict[str, Any]:
    return dict(scorer="miniature.contrastive", weights=str(paths.MINIATURE / "scorer"))


def _last_terms(config: ConfigDict) -> dict[str, Any]:
    guidance_scale = config.evaluation.guidance_scale
    return dict(
        distribution_matching=dict(guidance_scale=guidance_scale, aux_learning_rate=1e-4),
        adversarial=dict(weight=5e-3, aux_learning_rate=1e-3),
    )
