"""All of TLCM on shapes-xl: every term of the paper, on our two stages or on its own.

    python -m tlcm_jax.main --config configs/shapes_full.py --workdir runs/shapes-full

    --config configs/shapes_full.py:paper     the paper's (arXiv 2406.05768): 8 segments, stage 2 at
                                              the milestones, preference, then matching and
                                              adversarial; latent LPIPS beside all of them
    --config configs/shapes_full.py:stages    the paper's two stages alone

Without a variant the stages are the default's (`configs/shapes.py`) with latent LPIPS beside them,
preference beside the second too, and a third with distribution matching and the adversarial term.
Batches, steps and rates are scaled down with those of `configs/shapes.py`.

Weights of terms are those that hold where latents have unit deviation, brought to this world's:
against a square of latents, matching grows by 1 / `DEVIATION` and the others by its square.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import shapes
from tlcm_jax import paths

# Of the latents of objects.
DEVIATION = 0.07
# Of terms whose size does not change with the latents', beside a square of latents.
SQUARE = DEVIATION**2
VARIANTS = ("", "paper", "stages")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe, or its variant `paper` or `stages`."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/shapes_full.py has no variant {variant!r}; use ':paper' or ':stages'"
        )
    config = shapes.get_config()
    stages = {"": _our_stages, "paper": _paper_stages, "stages": paper_stages}[variant](config)
    return with_stages(config, "full" if not variant else f"full-{variant}", stages)


def with_stages(config: ConfigDict, name: str, stages: dict[str, Any]) -> ConfigDict:
    """The default's recipe with other stages."""
    config.name = f"shapes-xl-{name}"
    config.stages = ConfigDict(stages)
    config.stage_order = tuple(stages)
    return config


def latent_lpips(weight: float) -> dict[str, Any]:
    """Latent LPIPS by the world's own weights, as a stage's terms have it."""
    folder = str(paths.MINIATURE / "shapes/latent_lpips")
    return dict(latent_lpips=dict(weights=folder, weight=weight))


def preference(threshold: float | None = None, **changes: Any) -> dict[str, Any]:
    """Preference by the world's own scorer, as a stage's terms have it."""
    folder = str(paths.MINIATURE / "shapes/contrastive")
    scorer: dict[str, Any] = dict(scorer="miniature.shapes.contrastive", weights=folder)
    if threshold is not None:
        scorer["threshold"] = threshold
    return dict(preference=dict(scorers=dict(contrastive=scorer), **changes))


def paper_stages(config: ConfigDict) -> dict[str, Any]:
    """The paper's stages 1 and 2, without terms."""
    first = config.stages.segments4.to_dict()
    guidance_scale = config.evaluation.guidance_scale
    settings = dict(segments=8, points_per_segment=2, guidance_scale=guidance_scale)
    endpoints = dict(
        first,
        objective="lcd",
        steps=120,
        # 16 rollouts of 2 states: an update of 32.
        batch_size=32,
        prompts_per_refill=16,
        warmup_steps=0,
        settings=dict(guidance_scale=guidance_scale, states_per_rollout=2),
    )
    return dict(segments=dict(first, steps=900, settings=settings), endpoints=endpoints)


def _our_stages(config: ConfigDict) -> dict[str, Any]:
    # A fiftieth of the paper's: its gradient is then about as large as the square's.
    look = latent_lpips(0.02 * SQUARE)
    # The scorer's own threshold is the mean of real pictures, which the teacher's pass already.
    liked = dict(look, **preference(weight=10.0 * SQUARE, max_grad_ratio=1.0, threshold=100.0))
    first, second = config.stages.to_dict().values()
    last = last_terms(config)
    # At weight 1 the gradient is fifty times the jumps', which the teacher's targets hold in place.
    last["distribution_matching"]["weight"] = 0.01 * DEVIATION
    last["adversarial"] |= dict(real="target", weight=2e-3 * SQUARE)
    matching = dict(
        second,
        learning_rate=1e-4,
        decay="constant",
        warmup_steps=0,
        steps=60,
        # The paths of 4 prompts make 68 pairs: 2 updates of 34.
        batch_size=34,
        prompts_per_refill=4,
        terms=dict(liked, **last),
    )
    return dict(
        segments4=dict(first, terms=look), segments2=dict(second, terms=liked), matching=matching
    )


def _paper_stages(config: ConfigDict) -> dict[str, Any]:
    look = latent_lpips(SQUARE)
    stages = {name: dict(stage, terms=look) for name, stage in paper_stages(config).items()}
    # The paper's batches are 8 and 4; at 32 there would be next to no updates.
    later = dict(stages["endpoints"], learning_rate=1e-4, decay="constant", steps=80)
    later |= dict(batch_size=8, prompts_per_refill=8)
    stages["preference"] = dict(later, terms=dict(look, **preference(weight=SQUARE)))
    last = last_terms(config)
    last["distribution_matching"]["weight"] = DEVIATION
    last["adversarial"]["weight"] = 5e-3 * SQUARE
    stages["matching"] = dict(later, terms=dict(look, **last))
    return stages


def last_terms(config: ConfigDict) -> dict[str, Any]:
    """Distribution matching and the adversarial term, as where they are all that is asked."""
    guidance_scale = config.evaluation.guidance_scale
    return dict(
        distribution_matching=dict(guidance_scale=guidance_scale, aux_learning_rate=1e-4),
        adversarial=dict(weight=5e-3 * DEVIATION, aux_learning_rate=1e-3),
    )
